"""Widths found by the loss of whole models: the levels it chooses from, and that it keeps to what it was given."""

import itertools
import logging
import math
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers

from optimum_fwdprune import (
    Calibration,
    FwdPruner,
    PruningPlan,
    find_sites,
)
from optimum_fwdprune.allocation.constraints import LEVELS, levels_of
from optimum_fwdprune.files import save_tensors_atomically
from optimum_fwdprune.forward.divergence import Divergence
from optimum_fwdprune.forward.gates import Projection, replaced_projections
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.planning import levels as levels_module
from optimum_fwdprune.planning import search
from optimum_fwdprune.planning.levels import Levels
from optimum_fwdprune.reconstruction.least_squares import NormalEquations, nested_changes
from optimum_fwdprune.scoring.scores import Scores


def request_of(**fields):
    return tiny.request(**{"scope": "search", "sparsity": 0.4, "search_windows": 32, "seed": 1, **fields})


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


def levels_for(model, sites, kind, tokens, folder, **fields):
    """Levels from scores that follow a unit's place, as if least squares had helped everywhere."""
    scores = {site.key: torch.arange(site.num_units).float() for site in sites}
    request = tiny.request(reconstruction=kind, ridge=1e-3, multiple_of=4, **fields)
    return Levels(Subject(model, sites), scores, request, Calibration(tokens), folder)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "bias", "least_squares"])
def test_levels_are_the_projections_of_the_units_that_stay(dense, tokens, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(levels_module, "_ridge", lambda *_: 1e-3)
    sites = find_sites(dense, "kv_group")
    levels = levels_for(dense, sites, kind, tokens, tmp_path, attention_unit="kv_group")
    for site in sites[-2:]:
        assert levels.projection(site, site.num_units) is None
        for width in levels.widths(site)[1::3]:
            found = levels.projection(site, width)
            expected = by_numpy(
                dense, site, site.unit_mask(range(site.num_units - width, site.num_units)), tokens, kind
            )
            assert found.kept == expected.kept
            torch.testing.assert_close(found.weight, expected.weight, rtol=1e-2, atol=2e-3)
            if expected.bias is not None:
                torch.testing.assert_close(found.bias, expected.bias, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_divergence_is_that_of_the_whole_model_from_whatever_layer_it_starts(dense, tokens, tmp_path):
    sites = find_sites(dense)
    levels = levels_for(dense, sites, "none", tokens, tmp_path)
    mask = torch.ones_like(tokens)
    mask[:, -5:] = 0
    for calibration in (Calibration(tokens), Calibration(tokens, mask)):
        divergence = Divergence(Subject(dense, sites), calibration, 7)
        assert divergence.of({}) == pytest.approx(0, abs=1e-4)
        narrow = {site.key: levels.projection(site, levels.widths(site)[1]) for site in sites}
        other = narrow | {site.key: levels.projection(site, levels.widths(site)[-1]) for site in sites[-1:]}

        def expected(projections, calibration=calibration):
            def log_probabilities():
                logits = dense(input_ids=tokens, attention_mask=calibration.attention_mask).logits[:, 3::4]
                return logits.double().log_softmax(-1)

            with replaced_projections(sites, projections):
                pruned = log_probabilities()
            full = log_probabilities()
            terms = (full.exp() * (full - pruned)).sum(-1)
            counted = slice(None) if calibration.attention_mask is None else mask[:, 3::4].bool()
            return float(terms[counted].mean())

        assert divergence.settle(narrow) == pytest.approx(expected(narrow), rel=1e-3, abs=1e-5)
        assert divergence.of(other, first=2) == pytest.approx(expected(other), rel=1e-3, abs=1e-5)
        assert divergence.of(other) == pytest.approx(expected(other), rel=1e-3, abs=1e-5)
        # The model is as it was.
        assert divergence.of({}) == pytest.approx(0, abs=1e-4)


def test_divergence_needs_tokens_to_compare_at(tokens):
    model = tiny.make_model("llama_mha_tied")
    with pytest.raises(ValueError, match="hold nothing but padding"):
        Divergence(Subject.of(model), Calibration(tokens, torch.zeros_like(tokens)), 4)
    assert Divergence(Subject.of(model), Calibration(tokens[:, :2]), 4).of({}) == pytest.approx(0, abs=1e-4)


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

    assert levels_module._ridge(site, kept, [grams["alike"], grams["alike"]], [200, 200], None) == 1e-3
    assert levels_module._ridge(site, kept, [grams["alike"], grams["unlike"]], [200, 200], None) is None
    plain = levels_module._refitted(site, kept, grams["alike"], None)
    refitted = levels_module._refitted(site, kept, grams["alike"], 1e-6)
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
    """In passes of all layers; the three of this model are counted one by one."""
    model = tiny.make_model("llama_gqa_biases")
    passed = []
    through = Divergence._through

    def counted(self, batch, hidden, first, seen):
        passed.append(len(hidden) * (3 - first) / 3)
        return through(self, batch, hidden, first, seen)

    monkeypatch.setattr(Divergence, "_through", counted)
    for allowed in (20, 60, 300):
        passed.clear()
        pruner = FwdPruner(model)
        pruner.prune(request_of(search_windows=allowed), tokens, inplace=False)
        details = pruner.plan.metadata["scoring"]["search"]
        assert sum(passed) <= details["windows"] <= allowed
        assert details["sweeps"] >= 1


def lost_share(self, projections, first):
    """A divergence that knows no text: what sites lost, a hundred times as much in the last layer."""
    lost = 0.0
    for site in self._sites:
        kept = len(projections[site.key].kept) if site.key in projections else site.num_units
        lost += (100.0 if site.layer == 2 else 1.0) * (1 - kept / site.num_units) ** 2
    return lost


def test_it_finds_the_layer_that_matters(tokens, monkeypatch):
    monkeypatch.setattr(
        Divergence, "_measure", lambda self, projections, first, record: lost_share(self, projections, first)
    )
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    pruner.prune(request_of(search_windows=800, budget="joint"), tokens, inplace=False)
    kept = {layer: len(pruner.plan.kept[layer, "mlp"]) for layer in range(3)}

    assert kept[2] > 56 > 40 > max(kept[0], kept[1])
    history = pruner.scores.history
    assert history["keep_rate.2.mlp"][-1] > 0.9 and (history["loss"].diff() <= 0).all()
    details = pruner.plan.metadata["scoring"]["search"]
    assert details["divergence"] < 0.3 * details["even_divergence"]


@pytest.mark.parametrize(("ends_matter", "layers"), [(True, 12), (False, 12), (True, 11)])
def test_a_deep_model_starts_without_its_ends_where_that_is_nearer(tokens, monkeypatch, ends_matter, layers):
    """With so few windows that what it ends with is what it started from, but for one sweep."""

    def lost(self, projections, first, record):
        total = 0.0
        for site in self._sites:
            kept = len(projections[site.key].kept) if site.key in projections else site.num_units
            at_an_end = site.layer in (0, 1, layers - 2, layers - 1)
            total += (1 - kept / site.num_units) ** 2 * (9.0 if at_an_end == ends_matter else 1.0)
        return total

    monkeypatch.setattr(Divergence, "_measure", lost)
    monkeypatch.setattr("optimum_fwdprune.planning.search.Descent.run", lambda *_: None)
    pruner = FwdPruner(tiny.make_model("llama_mha_tied", num_hidden_layers=layers))
    pruner.prune(request_of(kinds=["mlp"], sparsity=0.2), tokens)
    kept = [len(pruner.plan.kept[layer, "mlp"]) for layer in range(layers)]
    spared = ends_matter and layers == 12

    assert [kept[layer] == 64 for layer in (0, 1, layers - 2, layers - 1)] == [spared] * 4
    assert max(kept[2:-2]) < 64
    details = pruner.plan.metadata["scoring"]["search"]
    assert (details["divergence"] < details["even_divergence"]) == spared


def test_what_it_ends_with_is_no_worse_than_the_even_share(dense, tokens):
    pruner = FwdPruner(dense)
    pruner.prune(request_of(search_windows=60), tokens, inplace=False)
    details = pruner.plan.metadata["scoring"]["search"]
    assert 0 < details["divergence"] <= details["even_divergence"]


def test_an_interrupt_ends_it_with_the_best_so_far(tokens, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("optimum_fwdprune.planning.search"), "propagate", True)
    monkeypatch.setattr(
        Divergence, "_measure", lambda self, projections, first, record: lost_share(self, projections, first)
    )
    move = search.Descent._move
    found = []

    def interrupted(self, state):
        if state.sweeps == 2:
            found.append(state.rates)
            raise KeyboardInterrupt
        return move(self, state)

    monkeypatch.setattr(search.Descent, "_move", interrupted)
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    pruner.prune(request_of(search_windows=800, budget="joint"), tokens, inplace=False)

    assert "interrupted after 2 sweeps" in caplog.text
    assert pruner.plan.metadata["scoring"]["search"]["sweeps"] == 2
    assert pruner.report.sparsity == pytest.approx(0.4, abs=0.02)
    widths = [len(pruner.plan.kept[key]) for key in pruner.plan.kept]
    # The levels' widths, to within what the finer grid of the request fills up.
    sizes = [pruner.plan.num_units[key] for key in pruner.plan.kept]
    assert widths == pytest.approx([float(rate) * size for rate, size in zip(found[0], sizes)], abs=4)


def test_a_search_that_was_killed_goes_on_bit_for_bit(tokens, tmp_path, monkeypatch):
    def run(**fields):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(request_of(search_windows=200, budget="joint", **fields), tokens)
        return pruner

    whole = run()
    assert whole.plan.metadata["scoring"]["search"]["sweeps"] > 3
    move = search.Descent._move

    def killed(self, state):
        if state.sweeps == 2:
            raise SystemExit
        return move(self, state)

    folder = str(tmp_path)
    monkeypatch.setattr(search.Descent, "_move", killed)
    with pytest.raises(SystemExit):
        run(resume=folder)
    monkeypatch.setattr(search.Descent, "_move", move)
    resumed = run(resume=folder)

    assert resumed.plan.kept == whole.plan.kept
    assert all(torch.equal(resumed.scores.history[name], values) for name, values in whole.scores.history.items())
    assert resumed.plan.metadata["scoring"]["search"] == whole.plan.metadata["scoring"]["search"]
    with pytest.raises(ValueError, match=r"belongs to another run: its sparsity is 0\.4, this one's is 0\.3"):
        run(resume=folder, sparsity=0.3)
    save_tensors_atomically(tmp_path / "search.safetensors", {}, {"identity": {}})
    with pytest.raises(ValueError, match="belongs to another run"):
        run(resume=folder)


def test_one_set_of_scores_serves_searches_at_several_budgets(tokens, tmp_path):
    model = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(model)
    scores = pruner.score(tiny.request(), tokens)
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
            "search_windows=7 is too small to try 6 sites and 3 moves on one window; set it to at least 12",
        ),
        ({"skip_layers": [0, 1], "sparsity": 0.1}, "only one site of each kind is pruned here"),
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
        FwdPruner(tiny.make_model("opt_post_norm_projected")).prune(request_of(reconstruction_target="dense"), tokens)


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
    pruner.prune(tiny.request(reconstruction="none"), plan=plan)
    again = FwdPruner(pruner.model)
    again.prune(request_of(), tokens)

    assert again.report.sparsity == pytest.approx(0.4, abs=0.02)
    assert 1 <= len(again.plan.kept[0, "mlp"]) <= 6


def test_levels_are_nested_and_obey_the_request():
    for site in find_sites(tiny.make_model("llama_gqa_biases")):
        scores = torch.randperm(site.num_units, generator=torch.Generator().manual_seed(0)).float()
        levels = levels_of(site, scores, tiny.request(multiple_of=8, min_units_per_site=2))
        sizes = [len(units) for units in levels]

        assert sizes == (list(range(56, 0, -8)) if site.kind == "mlp" else [3])
        for wide, narrow in itertools.pairwise(levels):
            assert set(narrow) < set(wide)
    assert LEVELS == 16


def test_sites_that_say_nothing_give_first(tokens):
    """Two of three layers are dead: narrowing them costs nothing, which has no logarithm."""
    model = tiny.make_model("llama_mha_tied")
    for layer in model.model.layers[:2]:
        layer.mlp.down_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.data.zero_()
    pruner = FwdPruner(model)
    pruner.prune(request_of(search_windows=200, reconstruction="none"), tokens, inplace=False)
    history = pruner.scores.history
    assert all(values.isfinite().all() for values in history.values())
    kept = pruner.plan.kept
    assert len(kept[2, "mlp"]) > len(kept[0, "mlp"]) and len(kept[2, "attention"]) == 6
    assert pruner.plan.metadata["scoring"]["search"]["divergence"] < 0.5 * history["loss"][0]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama_mqa", {"attention_unit": "kv_group"}),
        ("llama_gqa_biases", {"attention_unit": "kv_group", "min_units_per_site": 3}),
        ("llama_mha_tied", {"min_units_per_site": 6}),
    ],
)
def test_sites_without_a_second_width_stay_as_they_are(tokens, name, fields):
    pruner = FwdPruner(tiny.make_model(name))
    pruner.prune(request_of(budget="joint", sparsity=0.2, **fields), tokens)
    assert pruner.report.sparsity == pytest.approx(0.2, abs=0.02)
    for layer in range(3):
        assert len(pruner.plan.kept[layer, "attention"]) == pruner.plan.num_units[layer, "attention"]


def test_what_the_last_layers_are_spared_costs_all_the_same(tokens):
    """A pass of the first layers goes through the last ones too."""
    with pytest.raises(ValueError, match="search_windows=8 is too small to try 4 sites"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(request_of(skip_layers=[2], search_windows=8), tokens)


def test_a_grid_that_cannot_meet_the_budget_is_halved(tokens, monkeypatch):
    widths = []
    init = Levels.__init__

    def watched(self, subject, scores, config, *rest):
        widths.append(config.multiple_of)
        init(self, subject, scores, config, *rest)

    monkeypatch.setattr(Levels, "__init__", watched)
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    pruner.prune(request_of(mlp_sparsity=0.48, attention_sparsity=0.0, min_units_per_site=33), tokens)
    assert widths == ["auto"] or widths == [2]
    assert sum(len(pruner.plan.kept[layer, "mlp"]) for layer in range(3)) == round(0.52 * 3 * 64)


def test_levels_that_no_disk_can_hold_are_refused_first(tokens, monkeypatch):
    monkeypatch.setattr(levels_module.shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"take 0\.0 GB, .* Set TMPDIR to a folder on a larger disk"):
        FwdPruner(tiny.make_model("llama_mha_tied")).prune(request_of(), tokens)
