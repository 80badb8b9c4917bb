"""Noise from seeds, and models that compute with it while no weight changes."""

import copy
import dataclasses

import pytest
import tiny
import torch
from accelerate import cpu_offload

from optimum_fwdprune import find_sites
from optimum_fwdprune.scoring.gradients.perturbation import Noise, UnitPerturbation, WeightPerturbation


@pytest.fixture(params=["rademacher", "gaussian"])
def distribution(request):
    return request.param


def make(noise, shape=(40, 33), draw=0, place=0, dtype=torch.float32):
    return noise.tensor(shape, draw, place, dtype, torch.device("cpu"))


def test_noise_has_mean_zero_and_variance_one(distribution):
    values = make(Noise(0, distribution), (300, 301))

    assert values.shape == (300, 301)
    assert abs(float(values.mean())) < 0.02
    assert float(values.square().mean()) == pytest.approx(1, abs=0.02)
    # Neighbours, and the same bit of neighbouring bytes and words, know nothing of each other.
    flat = values.flatten()
    for lag in (1, 2, 8, 16, 64):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 0.02
    if distribution == "rademacher":
        assert set(flat.tolist()) == {-1.0, 1.0}


def test_noise_depends_on_seed_draw_and_place_and_on_nothing_else(distribution):
    noise = Noise(5, distribution)
    expected = make(noise, draw=3, place=2)
    torch.rand(7)

    assert torch.equal(make(Noise(5, distribution), draw=3, place=2), expected)
    assert torch.equal(make(noise, draw=3, place=2, dtype=torch.bfloat16), expected.bfloat16())
    for other in (make(Noise(6, distribution), draw=3, place=2), make(noise, draw=2, place=2), make(noise, draw=3)):
        assert abs(float((other * expected).mean())) < 0.1


@torch.no_grad()
def written(model, unit, perturbation, draw, step):
    """A copy of the model whose weights hold the perturbation."""
    changed = copy.deepcopy(model)
    parameters = [parameter for site in find_sites(changed, unit) for _, parameter in site.owned_parameters()]
    for index, parameter in enumerate(parameters):
        parameter.add_(step * perturbation.noise(draw, index).to(parameter))
    return changed


DRAWS, STEPS = [4, 4, 4, 7, 7], [0.01, 0.01, -0.01, -0.01, 0.02]


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@torch.no_grad()
def test_every_sequence_computes_with_its_own_weights(dense, tokens, unit, distribution):
    perturbation = WeightPerturbation(find_sites(dense, unit), Noise(1, distribution))
    plain = dense(tokens[:5]).logits
    with perturbation.applied(DRAWS, STEPS):
        together = dense(tokens[:5]).logits
    for row, (draw, step) in enumerate(zip(DRAWS, STEPS)):
        expected = written(dense, unit, perturbation, draw, step)(tokens[row : row + 1]).logits

        torch.testing.assert_close(
            together[row : row + 1], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )
        assert (together[row] - plain[row]).abs().max() > 1e-2 * plain[row].abs().max()
    assert torch.equal(dense(tokens[:5]).logits, plain)


@torch.no_grad()
def test_every_sequence_computes_with_its_own_gates(dense, tokens):
    sites = find_sites(dense)
    perturbation = UnitPerturbation(sites, Noise(1))
    with perturbation.applied(DRAWS, STEPS):
        together = dense(tokens[:5]).logits
    for row, (draw, step) in enumerate(zip(DRAWS, STEPS)):
        gates = perturbation.split(1 + step * perturbation.noise(draw, 0))
        scaled = copy.deepcopy(dense)
        for site in find_sites(scaled):
            site.projection.weight.mul_(site.feature_mask(gates[site.key]))
        expected = scaled(tokens[row : row + 1]).logits

        torch.testing.assert_close(
            together[row : row + 1], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


@torch.no_grad()
def test_a_step_below_the_resolution_of_the_weights_is_still_taken():
    """In bfloat16 1 ± 0.0009 is 1: the noise must not be added to the weight."""
    site = find_sites(tiny.make_model("qwen2", dtype=torch.bfloat16))[1]
    site = dataclasses.replace(site, couplings=site.couplings[-1:])
    site.projection.weight.fill_(1)
    perturbation = WeightPerturbation([site], Noise(0))
    half = torch.rand(1, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    # What the plain weights make of it cancels to 0, so only the shift is left.
    inputs = torch.cat([half, -half], dim=-1)
    with perturbation.applied([0], [0.0009]):
        found = site.projection(inputs).float()
    expected = 0.0009 * inputs.float() @ perturbation.noise(0, 0).float().T

    assert float((found - expected).norm() / expected.norm()) < 0.02


@torch.no_grad()
def test_float16_overflows_no_earlier_than_the_model():
    """The noise has entries of 1: x zᵀ is larger than any output, and must never stand alone."""
    site = find_sites(tiny.make_model("qwen2", dtype=torch.float16))[1]
    site = dataclasses.replace(site, couplings=site.couplings[-1:])
    site.projection.weight.fill_(0.01)
    inputs = torch.full((1, 3, 64), 30000.0, dtype=torch.float16)
    assert site.projection(inputs).isfinite().all()
    with WeightPerturbation([site], Noise(0)).applied([0], [1e-3]):
        assert site.projection(inputs).isfinite().all()


@pytest.mark.parametrize("kind", [WeightPerturbation, UnitPerturbation])
@torch.no_grad()
def test_offloaded_models_are_perturbed_alike(dense, tokens, kind):
    expected_from = kind(find_sites(dense), Noise(1))
    with expected_from.applied(DRAWS, STEPS):
        expected = dense(tokens[:5]).logits
    offloaded = cpu_offload(dense, execution_device="cpu")
    perturbation = kind(find_sites(offloaded), Noise(1))
    plain = offloaded(tokens[:5]).logits
    with perturbation.applied(DRAWS, STEPS):
        found = offloaded(tokens[:5]).logits

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert (found - plain).abs().max() > 2e-3 * plain.abs().max()
    assert torch.equal(offloaded(tokens[:5]).logits, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [WeightPerturbation, UnitPerturbation])
@torch.no_grad()
def test_an_interrupt_in_the_middle_of_a_forward_leaves_the_dense_model(dense, tokens, kind, dtype):
    dense.to(dtype)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    plain = dense(tokens).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    middle = find_sites(dense)[3].projection.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), kind(find_sites(dense), Noise(1)).applied([0] * 16, [0.1] * 16):
        dense(tokens)
    middle.remove()

    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert torch.equal(dense(tokens).logits, plain)
    assert not any("forward" in vars(module) for module in dense.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())


@torch.no_grad()
def test_a_perturbation_that_has_no_effect_is_an_error(tokens, monkeypatch):
    model = tiny.make_model("llama_gqa_biases")
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda hidden: hidden)
    with (
        pytest.raises(RuntimeError, match=r"bypassed model\.layers\.1\.mlp\.gate_proj"),
        WeightPerturbation(find_sites(model), Noise(1)).applied([0] * 16, [0.1] * 16),
    ):
        model(tokens)
