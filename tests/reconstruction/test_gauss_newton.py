"""Steps of the sources of pointwise sites, against finite differences and against numpy."""

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from optimum_fwdprune import Calibration, FwdPruner, find_sites
from optimum_fwdprune.forward.gates import kept_projection, kept_sources
from optimum_fwdprune.forward.layerwise import LayerRunner
from optimum_fwdprune.reconstruction import gauss_newton
from optimum_fwdprune.reconstruction.aims import Aims
from optimum_fwdprune.reconstruction.gauss_newton import (
    FACTOR_DAMPING,
    PULL,
    LeastSquares,
    Linearized,
    gauss_newton_changes,
)
from optimum_fwdprune.reconstruction.streams import Joining, Stream
from optimum_fwdprune.runs.shelves import Shelf


REQUEST = {"sparsity": 0.3, "kinds": ["mlp"], "refit_sources": True}


@pytest.fixture
def long_tokens():
    """Enough text that what is fitted to it holds on windows that were kept out."""
    return torch.randint(0, tiny.VOCAB, (96, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def problem():
    """50 tokens in two batches, 2 sources, 3 features, 4 inputs, 5 outputs; float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batches = [Linearized(random(count, 4), random(2, count, 3), random(count, 5)) for count in (30, 20)]
    return LeastSquares(batches, random(5, 3), (2, 3, 4))


def with_batches(problem, change):
    """The same problem with every batch changed."""
    return replace(problem, batches=[replace(batch, **change(batch)) for batch in problem.batches])


def jacobian(problem):
    """Everything that a change of one weight does to the outputs, column by column."""
    units = torch.eye(24, dtype=torch.float64).view(-1, *problem.shape)
    return torch.stack(
        [torch.cat([batch.outputs(unit, problem.weight) for batch in problem.batches]).flatten() for unit in units], 1
    ).numpy()


def residual_of(problem):
    return torch.cat([batch.residual for batch in problem.batches]).flatten().numpy()


def test_the_gradient_is_the_transpose_of_the_outputs(problem):
    expected = jacobian(problem).T @ residual_of(problem)
    np.testing.assert_allclose(problem.gradient().flatten().numpy(), expected)
    assert problem.error() == pytest.approx(np.square(residual_of(problem)).sum())


def test_the_steps_end_at_the_damped_least_squares_solution(problem, monkeypatch):
    """Solved by numpy: JᵀJ d + PULL P d = Jᵀ r, with P block by block the damped product of two Gram matrices."""
    # As many as there are weights are enough for conjugate gradients.
    monkeypatch.setattr(gauss_newton, "STEPS", 24)

    def damped(factor):
        return factor + FACTOR_DAMPING * np.trace(factor) / len(factor) * np.eye(len(factor))

    inputs = torch.cat([batch.inputs for batch in problem.batches]).numpy()
    slopes = torch.cat([batch.slopes for batch in problem.batches], dim=1).numpy()
    columns = problem.weight.numpy()
    blocks = [np.kron(damped(s.T @ s * (columns.T @ columns) / 50), damped(inputs.T @ inputs)) for s in slopes]
    pull = PULL * np.block([[blocks[0], np.zeros_like(blocks[0])], [np.zeros_like(blocks[0]), blocks[1]]])
    every = jacobian(problem)
    expected = np.linalg.solve(every.T @ every + pull, every.T @ residual_of(problem))

    *_, actual = gauss_newton._conjugate_gradients(problem)
    np.testing.assert_allclose(actual.flatten().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_steps_stop_where_held_out_tokens_gain_no_more(problem):
    every = list(gauss_newton._conjugate_gradients(problem))
    errors = [problem.error(changes) for changes in every]
    assert errors == sorted(errors, reverse=True) and len(errors) == gauss_newton.STEPS
    changes, before = gauss_newton_changes(problem, problem)
    torch.testing.assert_close(changes, every[-1])
    assert before == pytest.approx(float(np.square(residual_of(problem)).sum()))

    # Tokens that want the opposite lose by every step.
    opposite = with_batches(problem, lambda batch: {"residual": -batch.residual})
    assert gauss_newton_changes(problem, opposite)[0] is None
    # Ones that want what the first step gives lose by the second.
    first = with_batches(problem, lambda batch: {"residual": batch.outputs(every[0], problem.weight)})
    torch.testing.assert_close(gauss_newton_changes(problem, first)[0], every[0])


def test_features_that_are_never_used_and_tokens_without_error_change_nothing(problem):
    dead = with_batches(problem, lambda batch: {"slopes": torch.zeros_like(batch.slopes)})
    assert gauss_newton_changes(dead, dead)[0] is None
    perfect = with_batches(problem, lambda batch: {"residual": torch.zeros_like(batch.residual)})
    assert gauss_newton_changes(perfect, perfect) == (None, 0.0)
    half = with_batches(problem, lambda batch: {"slopes": batch.slopes * torch.tensor([1.0, 0.0, 1.0])})
    changes, _ = gauss_newton_changes(half, half)
    assert changes.isfinite().all() and not changes[:, 1].any() and changes[:, 0].any()


def in_front_of_the_second_layer(dense, tokens):
    """The sites of that layer, and a stream that has entered it."""
    runner = LayerRunner(dense)
    (batch,) = runner.batches(Calibration(tokens), len(tokens))
    sites = find_sites(dense)
    aims = Aims(sites, {site.key: [0] for site in sites})
    stream = Stream("0", batch, runner, Shelf(), joining=Joining(), follows_inputs=True, aims=aims, stays_dense=False)
    stream.start()
    for layer in range(2):
        of_layer = [each for each in find_sites(dense) if each.layer == layer]
        stream.enter(of_layer)
        if layer == 0:
            stream.leave(of_layer, {})
    return of_layer, stream


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "held"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float64, torch.float32)],
    ids=str,
)
def test_what_is_held_of_all_tokens_is_no_wider_than_the_model(dtype, held, tokens):
    """16 bit are held because no more was computed. Bfloat16 models multiply in it, and sum in float32."""
    sites, stream = in_front_of_the_second_layer(tiny.make_model("llama_gqa_biases").to(dtype), tokens)
    now = kept_projection(sites[1], list(range(0, 64, 2)))
    found = stream.linearize(sites, 1, {sites[1].key: now})
    assert (found.inputs.dtype, found.slopes.dtype, found.residual.dtype) == (held, held, torch.float32)
    weight = now.weight.float()
    fit = LeastSquares([found], weight, (2, 32, found.inputs.shape[1]))
    wide = LeastSquares([replace(found, inputs=found.inputs.float(), slopes=found.slopes.float())], weight, fit.shape)
    for narrow, exact in zip(fit.factors(), wide.factors()):
        assert torch.equal(narrow, exact) and narrow.dtype == torch.float32
    step = wide.gradient()
    products = [(each.gradient(), each.batches[0].outputs(step, weight), each.curved(step)) for each in (fit, wide)]
    for narrow, exact in zip(*products):
        assert narrow.dtype == torch.float32
        assert (narrow - exact).norm() <= 2 * torch.finfo(held).eps * exact.norm()
    # In 16 bit, which is what makes them fast.
    assert torch.equal(products[0][0], products[0][0].to(held).float())


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.REPRESENTATIVE)
def test_linearized_outputs_are_finite_differences(name, tokens):
    """Of the whole layer, whatever its activation, with some rows changed beforehand."""
    sites, stream = in_front_of_the_second_layer(tiny.make_model(name).double(), tokens)
    place = next(place for place, site in enumerate(sites) if site.pointwise)
    site, kept = sites[place], [1, 4, 7]
    assert site.kind == "mlp" and not any(each.pointwise for each in sites if each is not site)

    generator = torch.Generator().manual_seed(2)
    now = kept_projection(site, kept)
    rows = kept_sources(site, kept)

    def moved(by):
        changes = {
            name: by * torch.randn(each.shape, generator=generator, dtype=each.dtype) * (each.dim() == 2)
            for name, each in rows.items()
        }
        return changes, replace(now, sources={name: rows[name] + change for name, change in changes.items()})

    _, start = moved(0.1)
    step, _ = moved(1e-4)
    ahead, behind = (
        replace(start, sources={name: each + sign * step[name] for name, each in start.sources.items()})
        for sign in (1, -1)
    )
    left = [stream.observe(sites, place, {site.key: each})[1].double() for each in (ahead, behind)]
    expected = (left[1] - left[0]) / 2

    found = stream.linearize(sites, place, {site.key: start})
    assert not torch.is_grad_enabled() and not found.slopes.requires_grad
    changes = torch.cat([each for each in step.values() if each.dim() == 2]).view(len(found.slopes), len(kept), -1)
    actual = found.outputs(changes.float(), start.weight.float())
    # A few tokens sit where a ReLU bends.
    assert (actual - expected).norm() < 4e-2 * expected.norm() and expected.norm() > 0
    torch.testing.assert_close(found.residual, stream.observe(sites, place, {site.key: start})[1].float())


@pytest.mark.parametrize("name", tiny.REPRESENTATIVE)
def test_sources_bring_a_pointwise_site_nearer_to_its_target(name, long_tokens):
    dense, found = tiny.make_model(name), {}
    for with_sources in (False, True):
        pruner = FwdPruner(dense)
        pruner.prune(tiny.request(**{**REQUEST, "refit_sources": with_sources}), long_tokens, inplace=False)
        found[with_sources] = pruner.plan.metadata["reconstructed"]
        assert pruner.report.masked_difference < 1e-4
        assert all(("sources_refitted" in each) == with_sources for each in found[with_sources].values())
    # The first site that loses anything sees the same inputs and has the same target either way.
    plain, bent = (found[each]["0.mlp"] for each in (False, True))
    assert bent["sources_refitted"] and bent["held_out_error_before"] == pytest.approx(plain["held_out_error_before"])
    assert bent["held_out_error_after"] < plain["held_out_error_after"]

    changed = {
        f"{site.layer}.{site.kind}"
        for site, before in zip(find_sites(pruner.model), find_sites(dense))
        if any(
            not torch.equal(new.linear.weight, old.linear.weight[rows])
            for new, old in zip(site.sources, before.sources)
            for rows in [old.kept_index(before.num_units, pruner.plan.kept[before.key])]
        )
    }
    assert changed == {name for name, each in found[True].items() if each["sources_refitted"]}
    assert "0.attention" not in changed


@torch.no_grad()
def test_sources_read_corrected_inputs(long_tokens):
    """Queries, keys and values of layer 1 are W (I + D), D the ridge regression of the missing inputs on those there
    are, or untouched where held-out windows said so."""
    dense = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(dense)
    pruner.prune(tiny.request(**REQUEST, ridge=1.0), long_tokens, inplace=False)
    inputs = []
    for model in (dense, pruner.model):
        module = model.model.layers[1].input_layernorm
        handle = module.register_forward_hook(lambda _module, _args, output: inputs.append(output.flatten(0, 1)))
        model(long_tokens)
        handle.remove()
    wanted, there = (each.double() for each in inputs)
    gram = there.T @ there
    gram.diagonal().add_(1.0 * gram.diagonal().mean())
    change = (wanted - there).T @ there @ torch.linalg.inv(gram)
    for name in ("q_proj", "k_proj", "v_proj"):
        before, after = (getattr(model.model.layers[1].self_attn, name).weight for model in (dense, pruner.model))
        expected = before.double() @ (torch.eye(len(change), dtype=torch.float64) + change)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["llama_gqa_biases", "gemma2", "granite", "cohere", "gpt2"],
)
def test_every_step_towards_the_dense_model_brings_other_text_nearer_to_it(name, long_tokens):
    """Scaled outputs, and attention beside the MLP: none, the layer, the dense model, and sources too. Where norms
    follow projections, the targets of the layer and of the dense model are the same."""
    dense = tiny.make_model(name)
    other = torch.randint(0, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(2))
    wanted = dense(other).logits.log_softmax(-1)

    def divergence(**fields):
        pruned = FwdPruner(dense).prune(
            tiny.request(sparsity=0.3, kinds=["mlp"], **fields), long_tokens, inplace=False
        )
        return (wanted.exp() * (wanted - pruned(other).logits.log_softmax(-1))).sum(-1).mean()

    ways = [
        {"reconstruction": "none"},
        {"reconstruction_target": "layer"},
        {"reconstruction_target": "dense"},
        {"reconstruction_target": "dense", "refit_sources": True},
    ]
    if name == "gemma2":
        del ways[2]
    divergences = [divergence(**fields) for fields in ways]

    assert all(later < earlier for earlier, later in itertools.pairwise(divergences)), divergences


def test_where_the_stream_is_normalized_only_projections_are_refitted(caplog, long_tokens):
    pruner = FwdPruner(tiny.make_model("opt_post_norm_projected"))
    with caplog.at_level(logging.WARNING):
        pruner.prune(tiny.request(**REQUEST), long_tokens)
    assert "refit_sources needs projections whose outputs are added to the residual stream" in caplog.text
    assert all("sources_refitted" not in each for each in pruner.plan.metadata["reconstructed"].values())


def test_slopes_belong_to_their_source_whatever_the_order_of_calls(monkeypatch, long_tokens):
    def up_before_gate(mlp, x):
        up = mlp.up_proj(x)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)

    def sources_after():
        pruner = FwdPruner(tiny.make_model("llama_mqa"))
        pruner.prune(tiny.request(**REQUEST), long_tokens)
        return pruner.model.model.layers[0].mlp.gate_proj.weight

    expected = sources_after()
    monkeypatch.setattr(LlamaMLP, "forward", up_before_gate)
    torch.testing.assert_close(sources_after(), expected)


def test_in_inference_mode_too(long_tokens):
    pruner, expected = (FwdPruner(tiny.make_model("bloom")) for _ in range(2))
    expected.prune(tiny.request(**REQUEST), long_tokens)
    with torch.inference_mode():
        pruner.prune(tiny.request(**REQUEST), long_tokens)
    assert pruner.plan.metadata["reconstructed"] == expected.plan.metadata["reconstructed"]


@pytest.mark.parametrize("unit", ["query_head", "kv_group"])
def test_twice_in_bfloat16_with_padding(unit, long_tokens):
    """Heads and channels of a model that was pruned before."""
    mask = torch.ones_like(long_tokens)
    mask[::3, 20:] = 0
    rows = {"input_ids": long_tokens, "attention_mask": mask}
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", dtype=torch.bfloat16))
    for _ in range(2):
        pruner.prune(tiny.request(sparsity=0.2, refit_sources=True, attention_unit=unit), rows)
        assert any(each["sources_refitted"] for each in pruner.plan.metadata["reconstructed"].values())
        assert pruner.model.dtype == torch.bfloat16


def test_without_held_out_windows_only_inputs_are_corrected():
    tokens = torch.randint(0, tiny.VOCAB, (1, 200), generator=torch.Generator().manual_seed(1))
    pruner = FwdPruner(tiny.make_model("llama_mqa"))
    pruner.prune(tiny.request(**REQUEST), tokens)
    found = pruner.plan.metadata["reconstructed"]
    assert found["1.attention"]["sources_refitted"] and found["1.mlp"]["held_out_error_after"] is None
    # The first MLP reads what it read in the dense model.
    assert not found["0.mlp"]["sources_refitted"]


@pytest.mark.parametrize(
    "fields",
    [{"reconstruction": "none"}, {"reconstruction_order": "independent"}, {"reconstruction_target": "layer"}],
)
def test_refused_where_there_is_nothing_to_aim_at(fields):
    with pytest.raises(ValueError, match="refit_sources needs least squares layer by layer"):
        tiny.request(refit_sources=True, **fields)
