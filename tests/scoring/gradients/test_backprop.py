"""Exact gradients, and a model that is afterwards what it was."""

import copy

import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, find_sites
from optimum_fwdprune.scoring.gradients import backprop as module
from optimum_fwdprune.scoring.gradients.backprop import unit_gradients, weight_gradients


def owned(model):
    return [parameter for site in find_sites(model) for _, parameter in site.owned_parameters()]


def test_weight_gradients_are_autograds(dense, tokens):
    reference = copy.deepcopy(dense)
    reference(input_ids=tokens, labels=tokens).loss.backward()
    found = weight_gradients(dense, owned(dense), Calibration(tokens), batch_size=3)

    # Against the largest of all: a bias of the keys has a gradient of exactly 0, which only rounding fills.
    largest = max(float(parameter.grad.abs().max()) for parameter in owned(reference))
    for gradient, parameter in zip(found, owned(reference), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6 * largest)


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_gate_gradients_are_weight_times_gradient_over_the_projections_columns(dense, tokens, unit):
    sites = find_sites(dense, unit)
    found = unit_gradients(dense, sites, Calibration(tokens), batch_size=3)
    gradients = weight_gradients(dense, [site.projection.weight for site in sites], Calibration(tokens), 3)
    for site, gradient in zip(sites, gradients):
        expected = site.sum_features((gradient * site.projection.weight.detach()).sum(0))
        torch.testing.assert_close(found[site.key], expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max()))


def test_padding_is_left_out(tokens):
    model = tiny.make_model("llama_gqa_biases")
    mask = torch.ones(16, 30, dtype=torch.int64)
    mask[:, :6] = 0
    # The batches are of unequal token counts: one window is nearly all padding.
    mask[15, :28] = 0
    padded = Calibration(torch.cat([torch.zeros(16, 6, dtype=torch.int64), tokens], dim=1), mask)
    expected = weight_gradients(model, owned(model), padded, batch_size=16)
    for batch_size in (1, 5):
        for found, gradient in zip(weight_gradients(model, owned(model), padded, batch_size), expected):
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6)


def test_gradients_of_half_precision_models_are_summed_in_float32(tokens):
    exact = tiny.make_model("llama_gqa_biases", dtype=torch.float64)
    coarse = tiny.make_model("llama_gqa_biases", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), coarse.parameters()):
            parameter.copy_(rounded)
    expected = weight_gradients(exact, owned(exact), Calibration(tokens), 4)
    found = weight_gradients(coarse, owned(coarse), Calibration(tokens), 4)

    assert {gradient.dtype for gradient in found} == {torch.float32}
    pair = torch.stack([torch.cat([g.flatten().float() for g in gradients]) for gradients in (found, expected)])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.9
    assert {gate.dtype for gate in unit_gradients(coarse, find_sites(coarse), Calibration(tokens), 4).values()} == {
        torch.float32
    }


def test_small_gradients_survive_float16(tokens):
    """A mean loss over many tokens has gradients below what float16 resolves."""
    exact, coarse = (tiny.make_model("llama_gqa_biases", dtype=dtype) for dtype in (torch.float64, torch.float16))
    with torch.no_grad():
        for model in (exact, coarse):
            model.lm_head.weight.mul_(1e-3)
        for parameter, rounded in zip(exact.parameters(), coarse.parameters()):
            parameter.copy_(rounded)
    expected = weight_gradients(exact, owned(exact), Calibration(tokens), 16)
    found = weight_gradients(coarse, owned(coarse), Calibration(tokens), 16)
    pair = torch.stack([torch.cat([g.flatten().float() for g in gradients]) for gradients in (found, expected)])

    assert float(torch.corrcoef(pair)[0, 1]) > 0.999
    # Half precision rounds them, it does not lose them.
    assert float((pair[0] == 0).sum()) < 0.01 * pair.shape[1] + float((pair[1] == 0).sum())
    gates = [unit_gradients(m, find_sites(m), Calibration(tokens), 16) for m in (coarse, exact)]
    pair = torch.stack([torch.cat([gate.float() for gate in found.values()]) for found in gates])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.99


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_gradients_of_the_model_are_afterwards_what_they_were(tokens, fails, monkeypatch):
    model = tiny.make_model("llama_gqa_biases")
    model.lm_head.weight.requires_grad_(False)
    some = model.model.layers[0].mlp.up_proj.weight
    some.grad = torch.ones_like(some)
    if fails:
        monkeypatch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            weight_gradients(model, owned(model), Calibration(tokens), 4)
    else:
        weight_gradients(model, owned(model), Calibration(tokens), 4)
        unit_gradients(model, find_sites(model), Calibration(tokens), 4)

    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "lm_head.weight")
    assert torch.equal(some.grad, torch.ones_like(some))
    assert all(p.grad is None for p in model.parameters() if p is not some)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_model_that_does_not_fit_is_refused_with_a_way_out(tokens, monkeypatch):
    model = tiny.make_model("llama_gqa_biases")
    monkeypatch.setattr(module, "_free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"gradients take .* GiB, .* gradient='zeroth_order', which runs forward"):
        weight_gradients(model, owned(model), Calibration(tokens), 4)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_running_out_of_memory_on_the_way_is_named(tokens, monkeypatch, error):
    model = tiny.make_model("llama_gqa_biases")

    def forward(**_):
        raise error

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(MemoryError, match="smaller batch_size"):
        unit_gradients(model, find_sites(model), Calibration(tokens), 4)


def test_offloaded_models_are_refused(tokens):
    from accelerate import cpu_offload

    model = cpu_offload(tiny.make_model("llama_gqa_biases"), execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded weights"):
        weight_gradients(model, owned(model), Calibration(tokens), 4)
