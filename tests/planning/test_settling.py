"""What a request means for a model before any work: defaults that give way, refusals, and what is announced."""

import re

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.allocation.allocate import OutOfReach, allocate
from optimum_fwdprune.allocation.budgets import removal_budget
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.planning.forecast import forecast, warn_of_rounding
from optimum_fwdprune.planning.settler import Settler
from optimum_fwdprune.planning.settling import settle


def deep_model():
    """A model deep enough that its first and last layers are unpruned by default."""
    return tiny.make_model("llama_gqa_biases", num_hidden_layers=12)


def settled(sites, **fields):
    return settle(sites, PruningConfig(**fields), lambda config: (config, removal_budget(config, sites, 10**6, 10**7)))


def test_the_defaults_give_way_in_order_and_say_so(caplog):
    sites = find_sites(deep_model())
    share = {kind: sum(site.num_parameters for site in sites if site.kind == kind) for kind in ("attention", "mlp")}
    mlp = share["mlp"] / sum(share.values())

    config, _ = settled(sites, sparsity=0.85 * mlp * 8 / 12)
    assert (config.skip_layers, config.kinds) == (None, None) and not caplog.messages
    config, _ = settled(sites, sparsity=0.95 * mlp * 8 / 12)
    assert (config.skip_layers, config.kinds) == ([], None)
    assert len(caplog.messages) == 1 and "first and last two layers" in caplog.messages[0]
    caplog.clear()
    config, _ = settled(sites, sparsity=0.95 * mlp)
    assert (config.skip_layers, config.kinds) == ([], ["attention", "mlp"])
    assert len(caplog.messages) == 2 and "attention heads" in caplog.messages[1]


@pytest.mark.parametrize(("share", "skip_layers"), [(0.89, None), (0.92, [])])
def test_the_ends_give_way_by_what_layers_that_stay_lose(share, skip_layers):
    """Three layers go, of which one is among the eight whose MLPs are pruned by default."""
    sites = find_sites(deep_model())
    total = sum(site.num_parameters for site in sites)
    lost = total / 4 + 7 * share * sites[1].num_parameters
    config, _ = settled(sites, kinds=["layer", "mlp"], depth_sparsity=0.25, sparsity=lost / total)

    assert config.skip_layers == skip_layers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kinds": ["mlp"]}, r"kinds=\['mlp'\]"),
        ({"kinds": ["mlp"], "skip_layers": [0]}, r"skip_layers=\[0\]"),
        ({"mlp_sparsity": 0.99, "min_units_per_site": 8}, "min_units_per_site=8"),
    ],
)
def test_what_was_set_does_not_give_way(fields, message):
    sites = find_sites(deep_model())
    with pytest.raises(ValueError, match=f"{message}.*: the largest possible"):
        settled(sites, **{"sparsity": 0.9, **fields})


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", lambda *_args: pytest.fail("It was scored."))
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    for request in ({"sparsity": 0.99}, {"sparsity": 0.9, "kinds": ["mlp"]}, {"target_parameters": 10}):
        with pytest.raises(ValueError, match="the largest possible"):
            pruner.prune(dataset=torch.zeros(4, 8, dtype=torch.long), **request)


@pytest.mark.parametrize("budget", [{"sparsity": 0.83}, {"sparsity": 0.93}, {"target_parameters": 40_000}])
def test_a_budget_that_heads_and_channels_cannot_meet_takes_layers(budget, tokens, caplog):
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=6, vocab_size=tiny.VOCAB)
    sites = find_sites(model)
    smallest = sum(site.num_groups * site.unit_parameters for site in sites)
    pruner = FwdPruner(model)
    pruner.prune(dataset=tokens, reconstruction="none", inplace=False, **budget)
    left = sum(len(pruner.plan.kept[site.key]) * site.unit_parameters for site in sites)
    assert left < smallest and "whole layers are removed too" in caplog.text
    if "sparsity" in budget:
        assert pruner.report.sparsity == pytest.approx(budget["sparsity"], abs=0.01)
    else:
        assert pruner.report.parameters_after <= budget["target_parameters"]
    # As few layers as possible: with one layer more, the others could not meet the budget.
    gone = len({key.layer for key, kept in pruner.plan.kept.items() if not kept})
    assert gone == 6 - pruner.model.config.num_hidden_layers >= 1
    fields = {"kinds": ["attention", "mlp", "layer"], "depth_sparsity": (gone - 1) / 6}
    with pytest.raises(ValueError, match="the largest possible"):
        FwdPruner(model).prune(PruningConfig(**budget, **fields), tokens)


def test_layers_are_named_where_they_could_meet_a_budget_of_other_kinds(tokens):
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=6)
    with pytest.raises(ValueError, match=r"possible sparsity is 0\.6.* kinds=\['mlp', 'layer'\] and depth_"):
        FwdPruner(model).prune(dataset=tokens, sparsity=0.8, kinds=["mlp"])
    with pytest.raises(ValueError, match=r"largest possible .*target_parameters=\d+.* kinds=\['mlp', 'layer'\]\."):
        FwdPruner(model).prune(dataset=tokens, target_parameters=40_000, kinds=["mlp"])
    # Without the last layer and attention, it could not be met either.
    with pytest.raises(ValueError, match=r"largest possible .*target_parameters=[\d,]+\.$"):
        FwdPruner(model).prune(dataset=tokens, target_parameters=1_000, kinds=["layer"], method="magnitude")


def test_layers_are_not_named_where_a_family_keeps_them(tokens):
    with pytest.raises(
        ValueError, match=r"possible sparsity is [\d.]+\. Reduce the budget, or relax the constraint\.$"
    ):
        FwdPruner(tiny.make_model("opt_post_norm_projected")).prune(dataset=tokens, sparsity=0.7, kinds=["mlp"])


def test_models_that_share_scores_lose_no_layers_unasked():
    settler = Settler(Subject.of(tiny.make_model("llama_gqa_biases", num_hidden_layers=6)), None)
    settler.check(PruningConfig(sparsity=0.8))
    with pytest.raises(OutOfReach, match=r"cannot meet the budget alone.* Set kinds=\['attention', 'mlp', 'layer'\]"):
        settler.check(PruningConfig(sparsity=0.93))


def test_given_scores_have_none_of_layers(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=6))
    scores = pruner.score(dataset=tokens, sparsity=0.5)
    with pytest.raises(ValueError, match="the largest possible"):
        pruner.prune(scores=scores, sparsity=0.93)


@pytest.mark.parametrize("name", ["llama_gqa_biases", "opt_pre_norm", "bloom"])
def test_what_is_announced_is_what_happens(name, tokens):
    model = tiny.make_model(name)
    sites = find_sites(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    config = tiny.request(sparsity=0.4, reconstruction="none")
    budget = removal_budget(config, sites, before, 4 * before)
    outcome = forecast(sites, config, budget, before, 4 * before, 0)
    pruner = FwdPruner(model)
    pruner.prune(config, tokens)

    assert outcome.parameters - outcome.removed_parameters == pruner.report.parameters_after
    assert outcome.bytes - outcome.removed_bytes == pruner.report.bytes_after
    for kind in ("attention", "mlp"):
        lost = {
            1 - len(units) / pruner.plan.num_units[key] for key, units in pruner.plan.kept.items() if key[1] == kind
        }
        assert f"{lost.pop():.1%} are removed in every layer." in outcome.losses[kind] and not lost


def test_what_will_be_removed_is_written_before_anything_is_scored(monkeypatch, capsys, tokens):
    written = []

    def score(*_args):
        written.append(capsys.readouterr().err)
        raise ValueError("stop")

    monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", score)
    with pytest.raises(ValueError, match="stop"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(sparsity=0.4, dataset=tokens)
    assert "The pruned model will have" in written[0] and "MLP channels: 59.4% are removed" in written[0]
    assert "Attention heads: none is removed." in written[0]


def test_the_report_and_a_replay_say_what_each_layer_lost(capsys, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=12))
    pruner.prune(sparsity=0.3, dataset=tokens, reconstruction="none")
    line = "MLP channels: 44.8% are removed, 67.2% in layers 2 to 9, none in layers 0, 1, 10 and 11."

    assert line in str(pruner.report) and line in pruner.report._repr_html_()
    capsys.readouterr()
    FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=12)).prune(plan=pruner.plan)
    assert line in capsys.readouterr().err
    # Layers that lose unequal shares.
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(sparsity=0.3, scope="global", reconstruction="none"), tokens)
    assert "are removed, from " in str(pruner.report)


def test_layers_that_compete_are_announced_as_such():
    sites = find_sites(tiny.make_model("llama_gqa_biases"))
    config, budget = settled(sites, sparsity=0.3, scope="global")

    assert "Layers compete for the budget" in str(forecast(sites, config, budget, 10**6, 4 * 10**6, 0))


def test_a_request_that_removes_nothing_says_so(caplog):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(sparsity=0.02, multiple_of=32, reconstruction="none", method="magnitude")

    assert pruner.report.removed_parameters == 0
    assert any("removes nothing" in message and "multiple_of=32" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("fields", "widths", "message"),
    [
        ({"sparsity": 0.2}, [32, 64, 32], r"sparsity=0.2 becomes 0.2225 .*\(multiple_of=32\)"),
        ({"sparsity": 0.34}, [32, 32, 32], ""),
        ({"sparsity": 0.15, "scope": "global"}, [64, 64, 32], "sparsity=0.15 becomes 0.1112"),
        ({"mlp_sparsity": 0.3}, [32, 64, 32], "mlp_sparsity=0.3 becomes 0.3333"),
        # What one layer's channels round down is left to another's, not to heads.
        ({"sparsity": 0.25, "kinds": ["attention", "mlp"]}, [32, 64, 32], "sparsity=0.25 becomes"),
        ({"sparsity": 0.2, "layout": "stock"}, [32, 32, 32], "becomes 0.3337 .* layout='stock' cuts"),
        ({"sparsity": 0.15, "layout": "stock"}, [64, 64, 64], "removes nothing, .* layout='stock'"),
        ({"sparsity": 0.2, "multiple_of": 1}, [45, 45, 45], ""),
    ],
)
def test_layers_round_apart_so_that_all_together_come_nearest_to_the_share(fields, widths, message, caplog):
    sites = find_sites(tiny.make_model("llama_gqa_biases"))
    config, budget = settled(sites, **{"multiple_of": 32, **fields})
    scores = {site.key: torch.arange(site.num_units, dtype=torch.float32) - site.layer for site in sites}
    kept = allocate(sites, scores, config, budget)

    assert [len(kept[layer, "mlp"]) for layer in range(3)] == widths
    warn_of_rounding(sites, config, budget, forecast(sites, config, budget, 1, 1, 0))
    assert len(caplog.messages) == bool(message) and re.search(message, "".join(caplog.messages))


@pytest.mark.parametrize(
    ("model", "fields", "named"),
    [
        ("opt_pre_norm", {"layout": "stock"}, "layout='stock', which keeps all attention heads here"),
        ("opt_pre_norm", {"layout": "stock", "kinds": ["mlp"]}, "kinds=['mlp']"),
        (
            "opt_pre_norm",
            {"layout": "stock", "min_units_per_site": 3, "kinds": ["mlp"]},
            "min_units_per_site=3, kinds=['mlp']",
        ),
        ("llama_mqa", {"layout": "stock"}, "min_units_per_site=1"),
        ("llama_mqa", {"mlp_sparsity": 0.995}, "min_units_per_site=1"),
    ],
)
def test_a_refusal_names_what_was_set(model, fields, named):
    pruner = FwdPruner(tiny.make_model(model))
    with pytest.raises(OutOfReach, match=re.escape(f"can lose with {named}: the largest")):
        pruner.prune(sparsity=0.995, **fields)
