"""Least squares against numpy, the choice of its ridge, and the walk from layer to layer."""

import gc
import logging
import weakref

import numpy as np
import pytest
import tiny
import torch

from optimum_fwdprune import (
    Calibration,
    FwdPruner,
    PruningConfig,
    find_sites,
)
from optimum_fwdprune.forward.hooks import outputs_of, stopped_before
from optimum_fwdprune.forward.layerwise import LayerRunner
from optimum_fwdprune.reconstruction import independent, least_squares, reconstruct, streams
from optimum_fwdprune.reconstruction.least_squares import (
    RIDGES,
    NormalEquations,
    Refit,
    refit,
)
from optimum_fwdprune.reconstruction.sequential import refit_in_sequence


def sequential(target):
    return {"reconstruction_order": "sequential", "reconstruction_target": target}


INDEPENDENT = {"reconstruction_order": "independent"}


def pruned_by(model, tokens, **options):
    pruner = FwdPruner(model)
    request = {"sparsity": 0.4, "reconstruction": "least_squares", **INDEPENDENT, **options}
    pruner.prune(tiny.request(**request), tokens, inplace=False)
    return pruner


def features_of(site, units):
    return [unit * site.unit_width + offset for unit in units for offset in range(site.unit_width)]


def parts_of(pruner, model):
    """Every site that lost units, with its place in the pruned model, its kept and its removed features."""
    after = {site.key: site for site in find_sites(pruner.model)}
    for site in find_sites(model, pruner.plan.attention_unit):
        removed = pruner.plan.removed(site.key)
        if removed:
            yield site, after[site.key], features_of(site, pruner.plan.kept[site.key]), features_of(site, removed)


def held_out(tokens):
    return torch.arange(len(tokens)) % independent.HELD_OUT_EVERY == independent.HELD_OUT_EVERY - 1


def change_by_numpy(inputs, residual, ridge):
    """min |r - X Dᵀ|² + λ |D|²."""
    share = ridge * np.square(inputs).sum(0).mean()
    stacked = np.vstack([inputs, np.sqrt(share) * np.eye(inputs.shape[1])])
    return np.linalg.lstsq(stacked, np.vstack([residual, np.zeros((inputs.shape[1], residual.shape[1]))]), rcond=None)[
        0
    ].T


def assert_refitted(pruner, site, after, keep, inputs, residual):
    """The weights are the ridge regression over all tokens, or untouched where held-out tokens said so."""
    weight = site.projection.weight.detach().double().numpy()[:, keep]
    found = after.projection.weight.detach().double().numpy()
    summary = pruner.plan.metadata["reconstructed"][f"{site.layer}.{site.kind}"]
    if summary["refitted"]:
        expected = weight + change_by_numpy(inputs, residual, summary["ridge"])
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(found, weight)
    return summary["refitted"]


def test_independent_least_squares_solves_its_normal_equations(dense, tokens):
    pruner = pruned_by(dense, tokens)
    refitted = []
    for site, after, keep, gone in parts_of(pruner, dense):
        inputs = tiny.projection_inputs(dense, site, tokens)
        lost = inputs[:, gone] @ site.projection.weight.detach().double().numpy()[:, gone].T
        refitted.append(assert_refitted(pruner, site, after, keep, inputs[:, keep], lost))
    assert any(refitted)


def test_the_ridge_is_the_best_on_held_out_windows(dense, tokens):
    """And no reconstruction is better than every ridge wherever the columns were left as they are."""
    pruner = pruned_by(dense, tokens)
    apart = held_out(tokens)
    for site, _, keep, gone in parts_of(pruner, dense):
        summary = pruner.plan.metadata["reconstructed"][f"{site.layer}.{site.kind}"]
        weight = site.projection.weight.detach().double().numpy()
        errors = {}
        for ridge in RIDGES:
            fit, other = (tiny.projection_inputs(dense, site, part) for part in (tokens[~apart], tokens[apart]))
            change = change_by_numpy(fit[:, keep], fit[:, gone] @ weight[:, gone].T, ridge)
            left = other[:, gone] @ weight[:, gone].T - other[:, keep] @ change.T
            errors[ridge] = np.square(left).sum(1).mean()
        before = np.square(other[:, gone] @ weight[:, gone].T).sum(1).mean()

        assert errors[summary["ridge"]] == pytest.approx(min(errors.values()), rel=1e-3)
        assert summary["held_out_error_after"] == pytest.approx(min(errors.values()), rel=1e-3)
        assert summary["held_out_error_before"] == pytest.approx(before, rel=1e-3)
        assert summary["refitted"] == (summary["held_out_error_after"] < summary["held_out_error_before"])


def test_where_it_does_not_help_the_columns_stay_and_the_user_is_told(caplog, monkeypatch):
    """Held-out windows of another language than the rest."""
    model = tiny.make_model("llama_gqa_biases")
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 4, (16, 24), generator=generator)
    tokens[held_out(tokens)] = torch.randint(100, 300, (2, 24), generator=generator)
    monkeypatch.setattr(logging.getLogger("optimum_fwdprune.reconstruction.reconstruct"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pruner = pruned_by(model, tokens)
    untouched = [place for place, found in pruner.plan.metadata["reconstructed"].items() if not found["refitted"]]

    assert untouched
    assert f"at {len(untouched)} of 6 sites" in caplog.text
    for site, after, keep, _ in parts_of(pruner, model):
        same = torch.equal(after.projection.weight, site.projection.weight[:, keep])
        assert same == (f"{site.layer}.{site.kind}" in untouched)


def test_one_window_leaves_none_to_hold_out():
    pruner = pruned_by(tiny.make_model("llama_gqa_biases"), torch.randint(0, 300, (1, 64)))
    for found in pruner.plan.metadata["reconstructed"].values():
        assert found == {"refitted": True, "ridge": 0.01, "held_out_error_before": None, "held_out_error_after": None}


def test_a_ridge_of_ones_own_is_used(tokens):
    pruner = pruned_by(tiny.make_model("llama_gqa_biases"), tokens, ridge=0.37)
    assert {found["ridge"] for found in pruner.plan.metadata["reconstructed"].values()} == {0.37}


@pytest.mark.parametrize(
    "options", [INDEPENDENT, sequential("layer"), sequential("dense")], ids=lambda o: "-".join(o.values())
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_of_any_size_give_the_same(tokens, options, batch_size):
    model = tiny.make_model("opt_pre_norm")
    one, other = (pruned_by(model, tokens, batch_size=size, **options) for size in (16, batch_size))
    expected = one.model(tokens).logits

    assert (other.model(tokens).logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_gram_matrices_a_layer_at_a_time_give_the_same(tokens, monkeypatch):
    """Where those of all layers do not fit into memory at once."""
    model = tiny.make_model("llama_gqa_biases")
    expected = pruned_by(model, tokens).model(tokens).logits
    monkeypatch.setattr(independent, "GRAM_BYTES", 1)

    assert torch.equal(pruned_by(model, tokens).model(tokens).logits, expected)


@pytest.mark.parametrize("architecture_name", tiny.CONFIGS)
@torch.no_grad()
def test_layers_one_by_one_make_what_the_model_makes(dense, tokens):
    mask = torch.ones_like(tokens)
    mask[1, -5:] = 0
    runner = LayerRunner(dense)
    for calibration in (Calibration(tokens), Calibration(tokens, mask)):
        for batch in runner.batches(calibration, 7):
            hidden = runner.embed(batch)
            for layer in range(len(runner.layers)):
                hidden = runner.run(layer, batch, hidden)
            ids, own = batch.input_ids, batch.attention_mask
            with outputs_of([runner.layers[-1]]) as outputs:
                dense(input_ids=ids, attention_mask=own)
            expected = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            torch.testing.assert_close(batch.tokens(hidden), batch.tokens(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def streams_of(model, pruned, tokens):
    """What every projection writes, site by site, in both models: `[tokens, hidden]`, float64."""
    found = []
    for each in (model, pruned):
        with outputs_of(site.projection for site in find_sites(each)) as outputs:
            each(tokens)
        found.append([output.flatten(0, -2).double().numpy() for output in outputs])
    return found


def test_a_stream_that_is_normalized_on_its_way_is_no_target(tokens):
    with pytest.raises(ValueError, match=r"normalizes in between\. Use reconstruction_target='layer'"):
        pruned_by(tiny.make_model("opt_post_norm_projected"), tokens, **sequential("dense"))


@pytest.mark.parametrize("architecture_name", sorted({*tiny.REPRESENTATIVE, "granite"} - {"gemma2"}))
@torch.no_grad()
def test_sequential_least_squares_undoes_the_error_of_the_stream(dense, architecture_name, tokens):
    pruner = pruned_by(dense, tokens, **sequential("dense"))
    wanted, written = streams_of(dense, pruner.model, tokens)
    places = {site.key: place for place, site in enumerate(find_sites(dense))}
    refitted = []
    for site, after, keep, _ in parts_of(pruner, dense):
        place = places[site.key]
        # A site sees what those before it, refitted already, make of the text.
        inputs = tiny.projection_inputs(pruner.model, after, tokens)
        error = sum((written[earlier] - wanted[earlier] for earlier in range(place)), np.zeros_like(wanted[0]))
        weight, bias = site.projection.weight.double().numpy()[:, keep], site.projection.bias
        kept_says = inputs @ weight.T + (0 if bias is None else bias.double().numpy())
        residual = wanted[place] - error - kept_says
        refitted.append(assert_refitted(pruner, site, after, keep, inputs, residual))
    assert any(refitted)


@pytest.mark.parametrize("target", ["dense", "layer"])
def test_projections_that_lost_nothing_make_up_for_those_before_them(target):
    """Only the MLP of layer 1 is pruned: what follows can undo a part of its error, what precedes it has none."""
    tokens = torch.randint(0, tiny.VOCAB, (128, 24), generator=torch.Generator().manual_seed(1))
    dense = tiny.make_model("llama_gqa_biases")
    request = {"kinds": ["mlp"], "skip_layers": [0, 2], "mlp_sparsity": 0.25}
    pruner = pruned_by(dense, tokens, **sequential(target), **request)
    before = {site.key: site.projection.weight for site in find_sites(dense)}
    changed = {
        site.key
        for site in find_sites(pruner.model)
        if site.key != (1, "mlp") and not torch.equal(site.projection.weight, before[site.key])
    }
    refitted = {
        (int(name.split(".")[0]), name.split(".")[1])
        for name, summary in pruner.plan.metadata["reconstructed"].items()
        if summary["refitted"]
    }
    assert changed == refitted - {(1, "mlp")}
    assert changed <= {(2, "attention"), (2, "mlp")} and bool(changed) == (target == "dense")
    assert all(len(pruner.plan.kept[key]) == pruner.plan.num_units[key] for key in changed)


@torch.no_grad()
def test_sequential_least_squares_can_aim_at_the_layers_own_output(dense, tokens):
    assert_aimed_at_own_outputs(dense, pruned_by(dense, tokens, **sequential("layer")), tokens)


@pytest.mark.parametrize("architecture_name", ["gemma2", "gemma3_text", "exaone4"])
@torch.no_grad()
def test_projections_before_norms_aim_at_the_layers_own_output(dense, architecture_name, tokens):
    """Errors of earlier layers cannot be corrected behind a norm, so that both targets are the same."""
    assert_aimed_at_own_outputs(dense, pruned_by(dense, tokens, **sequential("dense")), tokens)


@pytest.mark.parametrize(
    ("architecture_name", "request_fields", "target"),
    [
        ("llama_gqa_biases", {}, "dense"),
        ("gemma2", {}, "layer"),
        ("gemma2", {"refit_sources": True}, "dense"),
        ("gemma2", {"kinds": ["layer"], "method": "block_influence", "sparsity": 0.34}, "dense"),
    ],
)
def test_the_default_target_follows_the_family_and_the_request(
    dense, architecture_name, request_fields, target, tokens, monkeypatch
):
    """Behind norms the dense model runs only where gaps are compensated for, or sources refitted."""
    targets = []

    def spy(subject, kept, texts, fit, *others):
        targets.append(fit.target)
        return refit_in_sequence(subject, kept, texts, fit, *others)

    monkeypatch.setattr(reconstruct, "refit_in_sequence", spy)
    pruned_by(dense, tokens, **sequential(None), **request_fields)

    assert targets == [target]


def assert_aimed_at_own_outputs(dense, pruner, tokens):
    after = {site.key: site for site in find_sites(pruner.model)}
    refitted = []
    for site, own, keep, gone in parts_of(pruner, dense):
        # The dense layer on what the pruned layers before it, and the pruned sites before it inside, make of the text.
        inputs = full_inputs(dense, pruner, site, after, tokens)
        lost = inputs[:, gone] @ site.projection.weight.double().numpy()[:, gone].T
        refitted.append(assert_refitted(pruner, site, own, keep, inputs[:, keep], lost))
    assert any(refitted)


def full_inputs(model, pruner, site, after, tokens):
    """All features that reach a projection when all sites before it compute as in the pruned model."""
    handles = []
    for earlier in find_sites(model, pruner.plan.attention_unit):
        if earlier.key == site.key:
            break
        keep = features_of(earlier, pruner.plan.kept[earlier.key])
        new = after[earlier.key].projection

        def hook(_module, args, _output, keep=keep, new=new):
            return new(args[0][..., keep])

        handles.append(earlier.projection.register_forward_hook(hook))
    found = tiny.projection_inputs(model, site, tokens)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("target", ["layer", "dense"])
def test_padding_is_left_out(tokens, target):
    model = tiny.make_model("opt_pre_norm")
    mask = torch.ones_like(tokens)
    mask[::2, -7:] = 0
    found = []
    for filler in (0, 17):
        padded = {"input_ids": tokens.where(mask.bool(), torch.tensor(filler)), "attention_mask": mask}
        found.append(pruned_by(model, padded, **sequential(target)).model(tokens).logits)
    whole = pruned_by(model, tokens, **sequential(target)).model(tokens).logits

    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert (found[0] - whole).abs().max() > 1e-3 * whole.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [INDEPENDENT, sequential("layer"), sequential("dense")], ids=lambda o: "-".join(o.values())
)
def test_bfloat16_models_gain_as_well(tokens, options):
    def error(model, **fields):
        pruned = FwdPruner(model).prune(tiny.request(sparsity=0.4, **fields), tokens, inplace=False)
        return float((pruned(tokens).logits.float() - model(tokens).logits.float()).square().mean())

    exact, rounded = (tiny.make_model("llama_gqa_biases", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))

    assert error(rounded, **options) < 0.5 * error(rounded, reconstruction="none")
    assert error(rounded, **options) == pytest.approx(error(exact, **options), rel=0.3)


def test_too_few_tokens_for_the_features_are_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optimum_fwdprune.reconstruction.reconstruct"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        pruned_by(tiny.make_model("llama_gqa_biases"), torch.randint(0, 300, (2, 16)))

    # 42 of 64 channels stay: whole heads cannot give 40 %.
    assert "32 calibration tokens are too few to determine the 42 kept features" in caplog.text
    assert "Use at least 3 windows of 16 tokens" in caplog.text


def test_a_forward_pass_that_stops_leaves_no_hook_behind(tokens):
    model = tiny.make_model("llama_gqa_biases")
    site = find_sites(model)[1]
    with stopped_before(site.projection) as stop:
        model(tokens)
    assert stop.inputs.shape == (16, 24, 64)
    with pytest.raises(RuntimeError, match="another"), stopped_before(site.projection):
        raise RuntimeError("another")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_that_stopped_holds_nothing(tokens):
    """Not even until the next garbage collection, which nothing on a GPU sets off."""
    model = tiny.make_model("llama_gqa_biases")
    site = find_sites(model)[1]
    gc.disable()
    try:
        with stopped_before(site.projection) as stop:
            model(tokens)
        inputs = weakref.ref(stop.inputs)
        del stop
        assert inputs() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "options", [INDEPENDENT, sequential("layer"), sequential("dense")], ids=lambda o: "-".join(o.values())
)
def test_a_window_of_padding_alone_is_not_held_out(tokens, options):
    model = tiny.make_model("opt_pre_norm")
    mask = torch.ones_like(tokens)
    mask[independent.HELD_OUT_EVERY - 1 :: independent.HELD_OUT_EVERY] = 0
    pruner = pruned_by(model, {"input_ids": tokens, "attention_mask": mask}, **options)

    assert all(found["held_out_error_before"] > 0 for found in pruner.plan.metadata["reconstructed"].values())


@pytest.mark.parametrize("options", [INDEPENDENT, sequential("dense")], ids=lambda o: "-".join(o.values()))
def test_without_a_ridge_singular_systems_are_still_solved(options):
    """Fewer tokens than features, of one window, and no ridge asked for."""
    tokens = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    pruner = pruned_by(tiny.make_model("llama_gqa_biases"), tokens, ridge=0.0, **options)

    assert pruner.model(tokens).logits.isfinite().all()


def test_nothing_lost_is_nothing_to_warn_of(caplog, monkeypatch):
    """Dead channels go first."""
    model = tiny.make_model("opt_pre_norm")
    for layer in model.model.decoder.layers:
        layer.fc1.weight.data[:32] = 0
        layer.fc1.bias.data[:32] = -1
    monkeypatch.setattr(logging.getLogger("optimum_fwdprune.reconstruction.reconstruct"), "propagate", True)
    tokens = torch.randint(0, 300, (16, 24), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        FwdPruner(model).prune(tiny.request(sparsity=0.2, kinds=["mlp"], **INDEPENDENT), tokens)

    assert "did not reduce the error" not in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"reconstruction": "bias", "reconstruction_order": "sequential"},
            "refits weights, and reconstruction is 'bias'",
        ),
        ({"method": "flap", "reconstruction_order": "sequential"}, "refits weights, and reconstruction is 'bias'"),
        ({"method": "random", "reconstruction_order": "sequential"}, "and reconstruction is 'none' here"),
        ({"ridge": -0.1}, "ridge must be at least 0; got -0.1"),
    ],
)
def test_requests_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.request(**fields)


def test_the_fast_preset_passes_every_window_once(tokens, monkeypatch):
    """Beside the probes of the first check and of the loop, and as long as the Gram matrices fit into memory."""
    model = tiny.make_model("llama_gqa_biases")
    passed = []
    # What is embedded alone, or stops before the first layer, is no pass.
    handle = model.model.layers[0].register_forward_hook(lambda _module, args, _output: passed.append(len(args[0])))
    request = PruningConfig.from_preset("fast", sparsity=0.4)
    once = FwdPruner(model).prune(request, tokens, inplace=False)
    probes = [2, 2, 2]
    assert sum(passed) == len(tokens) + sum(probes)
    passed.clear()
    monkeypatch.setattr(independent, "GRAM_BYTES", 1)
    again = FwdPruner(model).prune(request, tokens, inplace=False)
    handle.remove()
    assert sum(passed) > 2 * len(tokens)
    for name, parameter in once.named_parameters():
        torch.testing.assert_close(parameter, again.get_parameter(name), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mixtures_of_many_outputs_choose_the_ridge_that_all_of_them_choose(monkeypatch):
    """With tokens as scarce as here, the smallest and the largest ridge are both far from the best."""
    generator = torch.Generator().manual_seed(0)
    features, outputs = 24, 4096
    weight = torch.randn(outputs, features, generator=generator) / features**0.5
    fit, held_out = (NormalEquations.empty(features, outputs, torch.device("cpu")) for _ in range(2))
    for sums, tokens in ((fit, 30), (held_out, 200)):
        inputs = torch.randn(tokens, features, generator=generator)
        sums.add(inputs, inputs @ weight.T + 2 * torch.randn(tokens, outputs, generator=generator))
    mixed = refit(fit, held_out)
    monkeypatch.setattr(least_squares, "MIXTURES", outputs)
    exact = refit(fit, held_out)

    assert len(fit.mixed().cross) == outputs and least_squares.RIDGES[0] < exact.ridge
    assert mixed.ridge == exact.ridge
    assert mixed.error_after == exact.error_after and torch.equal(mixed.change, exact.change)


def test_a_refit_that_follows_another_is_told_as_one():
    first = Refit(torch.ones(2, 3, dtype=torch.float64), 0.1, 4.0, 3.0)
    second = Refit(torch.full((2, 3), 2.0, dtype=torch.float64), 1.0, 2.5, 2.0)
    both = first.followed_by(second)
    assert torch.equal(both.change, first.change + second.change)
    assert (both.ridge, both.error_before, both.error_after) == (1.0, 4.0, 2.0)
    # One that was of no use leaves what there was, at the error that it found.
    useless = Refit(None, 1.0, 2.5, 2.6)
    kept = first.followed_by(useless)
    assert kept.change is first.change and (kept.error_before, kept.error_after) == (4.0, 2.5)
    assert useless.followed_by(second).change is second.change


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_gqa_biases", "bloom"])
def test_attention_that_is_fitted_is_not_computed_again_in_its_layer(name, monkeypatch):
    """Bloom's attention adds the residual stream itself, so that it is computed again."""
    model, tokens = tiny.make_model(name), torch.randint(3, tiny.VOCAB, (12, 9))
    sites = find_sites(model)
    calls = []
    for site in sites:
        if site.kind == "attention":
            site.sources[0].linear.register_forward_hook(lambda *_args, layer=site.layer: calls.append(layer))
    pruner = FwdPruner(model)
    pruner.prune(tiny.request(sparsity=0.3, batch_size=6), tokens, inplace=False)
    with_replay = [calls.count(site.layer) for site in sites[::2]]
    calls.clear()
    monkeypatch.setattr(streams, "passed_on", lambda *_args: None)
    again = FwdPruner(model)
    again.prune(tiny.request(sparsity=0.3, batch_size=6), tokens, inplace=False)
    saved = [calls.count(site.layer) - before for site, before in zip(sites[::2], with_replay)]
    # Two runs of three batches: before the MLP is fitted, and for the stream behind the layer.
    assert saved == [0 if name == "bloom" else 2 * 3] * 3
    for one, other in zip(pruner.model.parameters(), again.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
