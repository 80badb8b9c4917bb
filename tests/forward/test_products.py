"""Sums of products over tokens, and the switch that lets the CPU multiply in bfloat16."""

import pytest
import torch

from optimum_fwdprune.forward.products import add_cross_products, add_products, mirror


needs_the_switch = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="PyTorch has the switch since version 2.9"
)


@pytest.fixture
def values():
    return torch.randn(300, 250, generator=torch.Generator().manual_seed(0))


def gram(values, **options):
    total = torch.zeros(values.shape[1], values.shape[1])
    add_products(total, values, **options)
    return mirror(total)


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_products_of_bfloat16_values_are_as_precise_as_float32_ones(values, in_bfloat16):
    values = values.bfloat16().float()
    exact = values.double().T @ values.double()

    assert (gram(values, in_bfloat16=in_bfloat16) - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_cross_products_round_the_outputs_to_bfloat16_at_most(values):
    outputs = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    values, exact = values.bfloat16().float(), outputs.double().T @ values.bfloat16().double()
    error = {}
    for in_bfloat16 in (False, True):
        total = torch.zeros(40, 250)
        add_cross_products(total, outputs, values, in_bfloat16)
        error[in_bfloat16] = float((total - exact).abs().max() / exact.abs().max())

    assert error[False] <= 1e-6 and error[True] <= 2**-9


@needs_the_switch
def test_the_switch_is_set_for_the_products_alone(values, monkeypatch):
    before, seen = torch.backends.mkldnn.matmul.fp32_precision, []
    multiply = torch.Tensor.addmm_

    def spy(total, *factors):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return multiply(total, *factors)

    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    gram(values, in_bfloat16=True)
    gram(values)

    assert seen[0] == "bf16" and seen[-1] == torch.backends.mkldnn.matmul.fp32_precision == before


@needs_the_switch
def test_the_switch_is_set_back_after_an_error(values):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        add_products(torch.zeros(3, 3), values, in_bfloat16=True)

    assert torch.backends.mkldnn.matmul.fp32_precision == before
