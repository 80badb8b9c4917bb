"""Widths found by the loss of whole models: the levels it chooses from, and that it keeps to what it was given."""

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
import transformers

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig, PruningPlan, find_sites, search
from optimum_fwdprune import mask_learning as learning
from optimum_fwdprune.allocation import LEVELS, levels_of
from optimum_fwdprune.gates import Projection, replaced_projections
from optimum_fwdprune.least_squares import NormalEquations, nested_changes
from optimum_fwdprune.scores import Scores


def request_of(**fields):
    return PruningConfig(**{"scope": "search", "sparsity": 0.4, "search_windows": 32, "seed": 1, **fields})


def test_nested_changes_are_those_of_each_set_alone():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    order = torch.randperm(12, generator=generator)
    gram = inputs.T @ inputs
    for width, change in zip((9, 4, 1), nested_changes(gram, weight, order, (9, 4, 1), 0.1)):
        kept, gone = order[:width], order[width:]
        share = 0.1 * float(gram.diagonal().mean()) * torch.eye(width).double()
        expected = torch.linalg.solve(gram[kept][:, kept] + share, gram[kept][:, gone] @ weight[:, gone].T).T
        torch.testing.assert_close(change, expected)
        # And they do what they are for.
        equations = NormalEquations.of_removed(gram.float(), 50, weight, torch.isin(torch.arange(12), kept))
        columns = kept.argsort()
        assert equations.error(change[:, columns]) < equations.energy


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "bias", "least_squares"])
def test_a_candidate_has_the_loss_of_the_pruned_model(dense, tokens, kind, monkeypatch):
    """Its projections are put together from the levels; those that this test makes itself must give the same loss."""
    seen = []
    losses = learning._Learner._losses

    def watched(self, masks, windows):
        found = losses(self, masks, windows)
        seen.append((masks, windows, found))
        return found

    monkeypatch.setattr(learning._Learner, "_losses", watched)
    # As if it had helped everywhere on held-out windows.
    monkeypatch.setattr(search, "_ridge", lambda *_: 1e-3)
    request = request_of(search_windows=8, reconstruction=kind, ridge=1e-3, attention_unit="kv_group")
    FwdPruner(dense).prune(request, tokens, inplace=False)
    sites = find_sites(dense, "kv_group")
    masks, windows, found = seen[0]
    for mask, loss in zip(masks[:2], found):
        parts = dict(zip((site.key for site in sites), mask.split([site.num_units for site in sites])))
        projections = {
            site.key: by_numpy(dense, site, parts[site.key].bool(), tokens, kind)
            for site in sites
            if parts[site.key].sum() < site.num_units
        }
        with replaced_projections(sites, projections):
            expected = dense(input_ids=tokens[windows], labels=tokens[windows]).loss
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert len(found.unique()) > 1


def by_numpy(model, site, mask, tokens, kind):
    """The projection of the kept units, its ridge a share of the mean over all features."""
    inputs = tiny.projection_inputs(model, site, tokens)
    columns = site.feature_mask(mask).numpy()
    weight = site.projection.weight.double().numpy()
    kept, lost = weight[:, columns], inputs[:, ~columns] @ weight[:, ~columns].T
    bias = site.projection.bias
    if kind == "bias":
        mean = torch.tensor(lost.mean(0)).float()
        bias = mean if bias is None else bias + mean
    if kind == "least_squares":
        gram = inputs[:, columns].T @ inputs[:, columns]
        share = 1e-3 * np.square(inputs).sum(0).mean() * np.eye(len(gram))
        kept = kept + np.linalg.solve(gram + share, inputs[:, columns].T @ lost).T
    return Projection(mask.nonzero().flatten().tolist(), torch.tensor(kept).float(), bias)


def test_levels_are_refitted_only_where_that_helps_on_held_out_windows(tokens):
    site = find_sites(tiny.make_model("llama_gqa_biases").requires_grad_(False))[1]
    kept = {40: list(range(40)), 20: list(range(20))}
    generator = torch.Generator().manual_seed(0)
    alike, unlike = torch.randn(200, 64, generator=generator), torch.randn(200, 64, generator=generator)
    # The last channels repeat the first, with the other sign in the text that is unlike.
    alike[:, 40:], unlike[:, 40:] = alike[:, :24], -unlike[:, :24]
    grams = {name: values.T @ values for name, values in (("alike", alike), ("unlike", unlike))}

    assert search._ridge(site, kept, [grams["alike"], grams["alike"]], [200, 200], None) == 1e-3
    assert search._ridge(site, kept, [grams["alike"], grams["unlike"]], [200, 200], None) is None
    plain = search._refitted(site, kept, grams["alike"], None)
    refitted = search._refitted(site, kept, grams["alike"], 1e-6)
    weight = site.projection.weight.detach()
    assert torch.equal(plain["20"], weight[:, :20])
    torch.testing.assert_close(
        refitted["40"], weight[:, :40] + torch.nn.functional.pad(weight[:, 40:], (0, 16)), rtol=1e-3, atol=1e-4
    )


def test_the_plan_keeps_to_budget_and_request(dense, tokens):
    pruner = FwdPruner(dense)
    request = request_of(attention_unit="kv_group", multiple_of=4, min_units_per_site=2, kinds=["mlp"], sparsity=0.2)
    pruner.prune(request, tokens, inplace=False)
    sites = find_sites(dense, "kv_group")

    assert pruner.report.sparsity == pytest.approx(0.2, abs=0.02)
    for site in sites:
        kept = pruner.plan.kept[site.key]
        assert len(kept) >= 2 or len(kept) == site.num_units
        assert len(kept) % 4 == 0 if site.kind == "mlp" else len(kept) == site.num_units


def test_it_passes_no_more_windows_than_it_was_given(tokens, monkeypatch):
    model = tiny.make_model("llama_gqa_biases")
    passed = []
    nll = learning.model_nll
    monkeypatch.setattr(
        learning, "model_nll", lambda model, ids, mask: passed.append(len(ids)) or nll(model, ids, mask)
    )
    pruner = FwdPruner(model)
    pruner.prune(request_of(search_windows=45), tokens, inplace=False)

    assert sum(passed) == 40
    assert pruner.plan.metadata["scoring"]["search"]["windows"] == 40
    assert pruner.plan.metadata["scoring"]["search"]["steps"] == 5


def test_it_finds_the_layer_that_matters(tokens, monkeypatch):
    """The loss of a candidate here is what the last layer lost."""
    model = tiny.make_model("llama_mha_tied")
    sites = find_sites(model)
    last = torch.cat([torch.full((site.num_units,), float(site.layer == 2)) for site in sites]).double()
    monkeypatch.setattr(
        learning._Learner, "_losses", lambda self, masks, windows: 50 * (1 - masks) @ last / last.sum()
    )
    pruner = FwdPruner(model)
    pruner.prune(request_of(search_windows=800, budget="joint"), tokens, inplace=False)
    kept = {layer: len(pruner.plan.kept[layer, "mlp"]) for layer in range(3)}

    assert kept[2] > 56 > 40 > max(kept[0], kept[1])
    assert pruner.scores.history["keep_rate.2.mlp"][-1] > 0.9


def test_a_search_that_was_stopped_goes_on_bit_for_bit(tokens, tmp_path, monkeypatch):
    def run(**fields):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(request_of(search_windows=200, **fields), tokens)
        return pruner

    whole = run()
    step = learning._Learner.step

    def killed(self, state, number):
        if number == 21:
            raise KeyboardInterrupt
        return step(self, state, number)

    file = str(tmp_path / "search.safetensors")
    monkeypatch.setattr(learning._Learner, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(search_checkpoint=file)
    monkeypatch.setattr(learning._Learner, "step", step)
    resumed = run(search_checkpoint=file)

    assert resumed.plan.kept == whole.plan.kept
    assert all(torch.equal(resumed.scores.history[name], values) for name, values in whole.scores.history.items())
    with pytest.raises(ValueError, match=r"belongs to another run: its sparsity is 0\.4, this one's is 0\.3"):
        run(search_checkpoint=file, sparsity=0.3)


def test_one_set_of_scores_serves_searches_at_several_budgets(tokens, tmp_path):
    model = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(model)
    scores = pruner.score(PruningConfig(), tokens)
    for sparsity in (0.2, 0.4):
        pruner = FwdPruner(model)
        pruner.prune(request_of(sparsity=sparsity), scores=scores, inplace=False)
        assert pruner.report.sparsity == pytest.approx(sparsity, abs=0.02)
    pruner.save_pretrained(tmp_path / "out")
    loaded = Scores.load(tmp_path / "out")

    assert math.isfinite(float(loaded.history["loss"][-1])) and "search" not in scores.details
    for key, values in scores.values.items():
        assert torch.equal(loaded.values[key], values)


def test_methods_that_need_no_text_search_on_the_text_given(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(request_of(method="magnitude", reconstruction="none"), tokens)

    assert pruner.plan.metadata["calibration"]["fingerprint"] == Calibration(tokens).fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"search_windows": 7},
            "search_windows=7 is too few for one step of 4 candidates on 2 windows; give at least 8",
        ),
        ({"skip_layers": [0, 1], "sparsity": 0.1}, "only one of each kind is pruned here"),
    ],
)
def test_searches_that_cannot_move_are_refused(tokens, fields, message):
    with pytest.raises(ValueError, match=message):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(request_of(**fields), tokens)


def test_what_a_model_cannot_do_fails_before_anything_is_scored(tokens, monkeypatch):
    monkeypatch.setattr(FwdPruner, "score", lambda *_: pytest.fail("it scored"))
    classifier = transformers.LlamaForSequenceClassification(tiny.make_model("llama_gqa_biases").config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification predicts no next token"):
        FwdPruner(classifier).prune(request_of(), tokens)
    with pytest.raises(ValueError, match="normalizes in between"):
        FwdPruner(tiny.make_model("opt_post_norm_projected")).prune(
            request_of(reconstruction_order="sequential"), tokens
        )


def test_a_request_finer_than_the_levels_is_met(tokens):
    """Only a channel in twenty stays; the levels would stop at one in sixteen."""
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    pruner.prune(request_of(mlp_sparsity=0.95, attention_sparsity=0.0), tokens)

    assert sum(len(pruner.plan.kept[layer, "mlp"]) for layer in range(3)) == round(0.05 * 3 * 64)


def test_pruned_models_with_narrow_sites_are_searched_as_well(tokens):
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    kept = {key: [0, 1, 2, 3, 4, 5] for key in [(0, "mlp"), *((layer, "attention") for layer in range(3))]}
    kept |= {(layer, "mlp"): list(range(64)) for layer in (1, 2)}
    sites = find_sites(pruner.model)
    plan = PruningPlan(kept, {site.key: site.num_units for site in sites}, "llama", "query_head", {})
    pruner.prune(PruningConfig(reconstruction="none"), plan=plan)
    again = FwdPruner(pruner.model)
    again.prune(request_of(), tokens)

    assert again.report.sparsity == pytest.approx(0.4, abs=0.02)
    assert 1 <= len(again.plan.kept[0, "mlp"]) <= 6


def test_levels_are_nested_and_obey_the_request():
    for site in find_sites(tiny.make_model("llama_gqa_biases")):
        scores = torch.randperm(site.num_units, generator=torch.Generator().manual_seed(0)).float()
        levels = levels_of(site, scores, PruningConfig(multiple_of=8, min_units_per_site=2))
        sizes = [len(units) for units in levels]

        assert sizes == (list(range(56, 0, -8)) if site.kind == "mlp" else [3])
        for wide, narrow in itertools.pairwise(levels):
            assert set(narrow) < set(wide)
    assert LEVELS == 16
