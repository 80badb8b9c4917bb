"""Every criterion against a plain loop over its formula."""

import numpy as np
import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig, Scores, find_sites, register_method
from optimum_fwdprune.request.registry import METHODS


@pytest.fixture(params=["kv_group", "query_head"])
def unit(request):
    return request.param


def scores_of(model, tokens, unit, method):
    return FwdPruner(model).score(tiny.request(method=method, attention_unit=unit), tokens).values


def columns_of(site, unit_index):
    return range(unit_index * site.unit_width, (unit_index + 1) * site.unit_width)


def test_wanda_sp(dense, tokens, unit):
    scores = scores_of(dense, tokens, unit, "wanda_sp")
    for site in find_sites(dense, unit):
        weight = site.projection.weight.detach().double().numpy()
        norms = np.linalg.norm(tiny.projection_inputs(dense, site, tokens), axis=0)
        expected = [
            sum(abs(weight[i, j]) * norms[j] for j in columns_of(site, u) for i in range(len(weight)))
            for u in range(site.num_units)
        ]
        np.testing.assert_allclose(scores[site.key], expected, rtol=1e-4)


def test_flap(dense, tokens, unit):
    scores = scores_of(dense, tokens, unit, "flap")
    for site in find_sites(dense, unit):
        weight = site.projection.weight.detach().double().numpy()
        variance = tiny.projection_inputs(dense, site, tokens).var(0)
        metric = np.array([variance[j] * sum(w**2 for w in weight[:, j]) for j in range(len(variance))])
        metric = (metric - metric.mean()) / metric.std(ddof=1)
        expected = [np.mean([metric[j] for j in columns_of(site, u)]) for u in range(site.num_units)]
        np.testing.assert_allclose(scores[site.key], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_magnitude_is_the_norm_of_what_surgery_would_remove(dense, unit):
    scores = scores_of(dense, None, unit, "magnitude")
    for site in find_sites(dense, unit):
        for index in (0, site.num_units - 1):
            others = [u for u in range(site.num_units) if u != index]
            squares = 0.0
            for coupling in site.couplings:
                stays = coupling.kept_index(site.num_units, others)
                for _, parameter in coupling.parameters():
                    parameter = parameter.double()
                    squares += float(
                        parameter.square().sum() - parameter.index_select(coupling.axis, stays).square().sum()
                    )
            assert float(scores[site.key][index]) == pytest.approx(squares**0.5, rel=1e-3)


def test_random_follows_its_seed_and_nothing_else(dense, unit):
    first, again, other = (
        FwdPruner(dense).score(tiny.request(method="random", attention_unit=unit, seed=seed)).values
        for seed in (1, 1, 2)
    )

    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if len(first[key]) > 1)


@pytest.mark.parametrize("method", ["wanda_sp", "flap"])
def test_batch_size_makes_no_difference(dense, tokens, method):
    one, many = (
        FwdPruner(dense).score(tiny.request(method=method, batch_size=size), tokens).values for size in (1, 16)
    )
    for key in one:
        torch.testing.assert_close(one[key], many[key], rtol=1e-3, atol=1e-5)


def test_flaps_bias_is_the_mean_output_of_what_was_removed(dense, tokens):
    pruner = FwdPruner(dense)
    pruned = pruner.prune(tiny.request(method="flap", sparsity=0.4), tokens, inplace=False)
    after = {site.key: site for site in find_sites(pruned)}
    for site in find_sites(dense, pruner.plan.attention_unit):
        weight = site.projection.weight.detach().double().numpy()
        mean = tiny.projection_inputs(dense, site, tokens).mean(0)
        gone = [j for u in pruner.plan.removed(site.key) for j in columns_of(site, u)]
        bias = site.projection.bias
        expected = weight[:, gone] @ mean[gone] + (0 if bias is None else bias.detach().double().numpy())
        found = after[site.key].projection.bias
        if found is None:
            # Nothing of this kind was removed anywhere, so no layer has a bias.
            assert not gone
            continue
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-3, atol=1e-4)


def test_dead_features_stay_finite(tokens):
    """A projection whose inputs are all zero must not divide by it."""
    model = tiny.make_model("llama_gqa_biases", mlp_bias=False)
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    for method in ("wanda_sp", "flap"):
        for reconstruction in ("none", "bias", "least_squares"):
            config = tiny.request(method=method, sparsity=0.4, reconstruction=reconstruction)
            pruned = FwdPruner(model).prune(config, tokens, inplace=False)

            assert pruned(tokens).logits.isfinite().all()


def test_a_criterion_of_ones_own(tokens, monkeypatch, tmp_path):
    """`register_method` makes a criterion known to prune() and to the files, with its own fields."""
    from dataclasses import dataclass

    @dataclass
    class LastConfig(PruningConfig):
        method: str = "keep_last"
        reverse: bool = False

    def score(inputs):
        sign = -1 if inputs.config.reverse else 1
        # A plain tuple names a site as well as its key does.
        return {(site.layer, site.kind): sign * torch.arange(float(site.num_units)) for site in inputs.sites}

    # Forgotten afterwards.
    monkeypatch.setitem(METHODS, "keep_last", METHODS["random"])
    register_method(LastConfig, score, additive=False)
    for reverse in (False, True):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(tiny.request(method="keep_last", reverse=reverse, reconstruction="none"))
        kept = pruner.plan.kept[(0, "mlp")]

        assert kept == list(range(len(kept)) if reverse else range(64 - len(kept), 64))

        pruner.scores.save(tmp_path / "scores.safetensors")
        assert Scores.load(tmp_path / "scores.safetensors").values.keys() == pruner.scores.values.keys()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda sites: {}, r"must score \d+ units for the attention of layer 0"),
        (lambda sites: {s.key: torch.zeros(1) for s in sites}, r"must score \d+ units"),
        (lambda sites: {s.key: torch.full((s.num_units,), torch.nan) for s in sites}, "scored NaN or infinity in the"),
    ],
)
def test_a_criterion_that_scores_nonsense_is_named(scores, message, monkeypatch):
    method = METHODS["random"]
    changed = type(method)(method.config_class, lambda inputs: scores(inputs.sites), additive=False)
    monkeypatch.setitem(METHODS, "random", changed)
    with pytest.raises(ValueError, match=f"Method 'random' {message}"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).score(tiny.request(method="random"))


@pytest.mark.parametrize("method", ["wanda_sp", "flap"])
def test_calibrated_methods_need_tokens(method):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).score(tiny.request(method=method, calibration="builtin"))


def test_scores_measured_with_padding_are_those_without(tokens):
    """A padded batch scores as its unpadded windows do."""
    model = tiny.make_model("llama_gqa_biases")
    mask = torch.ones(16, 30, dtype=torch.int64)
    mask[:, :6] = 0
    padded = torch.cat([torch.zeros(16, 6, dtype=torch.int64), tokens], dim=1)
    plain = FwdPruner(model).score(None, Calibration(tokens)).values
    found = FwdPruner(model).score(None, {"input_ids": padded, "attention_mask": mask}).values
    for key in plain:
        torch.testing.assert_close(found[key], plain[key], rtol=1e-3, atol=1e-4)
