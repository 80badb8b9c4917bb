"""Pruning in rounds: the budget is that of one cut, and the plan of all rounds is one that can be replayed."""

import dataclasses

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.allocation.budgets import Budget
from optimum_fwdprune.allocation.depth import can_go, depth_units, removed_units
from optimum_fwdprune.architectures import SiteKey
from optimum_fwdprune.planning import run as run_module


def removed(plan, sites):
    return sum(len(plan.removed(site.key)) * site.unit_parameters for site in sites)


@pytest.mark.parametrize(
    ("architecture_name", "reconstruction"),
    [(name, reconstruction) for name in tiny.REPRESENTATIVE for reconstruction in ("none", "least_squares")],
)
def test_rounds_come_to_the_budget_and_to_a_plan_that_gives_the_same_units(dense, tokens, reconstruction):
    sites = find_sites(dense)
    prunable = sum(site.num_parameters for site in sites)
    request = tiny.request(sparsity=0.4, rounds=3, reconstruction=reconstruction)
    pruner = FwdPruner(dense)
    pruned = pruner.prune(request, tokens, inplace=False)

    # Whole heads and single channels: within half a channel in every layer, as in one round.
    channel = next(site.unit_parameters for site in sites if site.kind == "mlp")
    assert abs(removed(pruner.plan, sites) - 0.4 * prunable) <= 3 * (channel / 2 + 1)
    assert pruner.report.sparsity == pytest.approx(0.4, abs=3 * channel / prunable)
    assert pruner.plan.metadata["requested_sparsity"] == pytest.approx(0.4, abs=1 / prunable)
    replayed = FwdPruner(dense).prune(plan=pruner.plan, inplace=False)
    assert replayed.config.model_type == pruned.config.model_type
    for name, parameter in replayed.named_parameters():
        assert parameter.shape == pruned.get_parameter(name).shape
        if reconstruction == "none":
            assert torch.equal(parameter, pruned.get_parameter(name)), name


def test_later_rounds_score_what_the_earlier_ones_left_on_the_same_tokens(tokens, monkeypatch):
    dense = tiny.make_model("llama_gqa_biases")
    seen = []
    score_units = run_module.score_units

    def watched(subject, job, evidence, keep):
        found = score_units(subject, job, evidence, keep)
        units = sum(site.num_units for site in subject.sites)
        seen.append((subject.model, units, evidence.calibration.fingerprint, found))
        return found

    monkeypatch.setattr(run_module, "score_units", watched)
    # Written by the model itself: the second round must not ask the pruned one to write anew.
    request = tiny.request(sparsity=0.4, rounds=2, calibration="self", n_samples=4, seq_len=16)
    FwdPruner(dense).prune(request)

    (first, units, text, before), (second, units_left, same_text, after) = seen
    assert first is dense and second is not dense
    assert units_left < units and text == same_text
    # Norms of activations behind pruned layers: scoring once would have found others.
    key = (2, "mlp")
    assert not torch.isin(after.values[key], before.values[key]).all()


def test_given_scores_serve_the_first_round(tokens, monkeypatch):
    dense = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(dense)
    scores = pruner.score(tiny.request(), tokens)
    scores.values[(0, "mlp")][0] = -1e9
    pruner.prune(tiny.request(sparsity=0.3, rounds=2), scores=scores)
    assert 0 not in pruner.plan.kept[(0, "mlp")]


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_sparsity": 0.5, "mlp_sparsity": 0.25},
        {"target_parameters": 60_000},
        {"scope": "global", "budget": "joint", "attention_unit": "kv_group"},
        {"kinds": ["mlp"], "multiple_of": 4, "skip_layers": [0]},
    ],
    ids=str,
)
def test_every_kind_of_budget_can_be_spent_in_rounds(tokens, fields):
    dense = tiny.make_model("llama_mha_tied")
    size = sum(parameter.numel() for parameter in dense.parameters())
    sites = find_sites(dense, fields.get("attention_unit", "query_head"))
    pruner = FwdPruner(dense)
    share = {} if "target_parameters" in fields else {"sparsity": 0.25}
    pruner.prune(tiny.request(rounds=2, **share, **fields), tokens, inplace=False)
    plan = pruner.plan
    if "attention_sparsity" in fields:
        for site in sites:
            share = fields[f"{site.kind}_sparsity"]
            assert len(plan.kept[site.key]) == pytest.approx((1 - share) * site.num_units, abs=0.5)
    elif "target_parameters" in fields:
        assert fields["target_parameters"] - 200 <= pruner.report.parameters_after <= fields["target_parameters"]
        assert size > fields["target_parameters"]
    else:
        prunable = sum(site.num_parameters for site in sites)
        step = max(site.unit_parameters * (fields.get("multiple_of", 1)) for site in sites if site.kind == "mlp")
        assert abs(removed(plan, sites) - 0.25 * prunable) <= step
    for site in sites:
        if site.kind == "mlp":
            assert len(plan.kept[site.key]) % fields.get("multiple_of", 1) == 0


def test_the_last_query_head_of_a_group_stays(tokens):
    """Two heads in each of three groups: once one is left, the units of the pruned layer are KV groups."""
    dense = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(dense)
    pruner.prune(tiny.request(attention_sparsity=0.5, mlp_sparsity=0.6, rounds=3), tokens, inplace=False)
    assert all(len(pruner.plan.kept[(layer, "attention")]) == 3 for layer in range(3))
    FwdPruner(dense).prune(plan=pruner.plan)


def test_a_budget_beyond_reach_is_refused_before_anything_is_cut(tokens):
    dense = tiny.make_model("llama_mha_tied")
    before = {name: parameter.shape for name, parameter in dense.named_parameters()}
    request = tiny.request(sparsity=0.6, rounds=3, kinds=["mlp"], skip_layers=[0])
    with pytest.raises(ValueError, match="largest possible sparsity is"):
        FwdPruner(dense).prune(request, tokens)
    assert {name: parameter.shape for name, parameter in dense.named_parameters()} == before


def test_every_round_keeps_a_state_of_its_own(tokens, tmp_path):
    request = tiny.request(sparsity=0.4, rounds=2, resume=str(tmp_path), resume_seconds=0.0)
    plans, passed = [], []
    for _ in range(2):
        model = tiny.make_model("llama_gqa_biases")
        model.model.layers[0].register_forward_hook(lambda *_: passed[-1].append(1))
        passed.append([])
        pruner = FwdPruner(model)
        pruner.prune(request, tokens)
        plans.append(pruner.plan.kept)

    assert plans[0] == plans[1] and len(passed[1]) < len(passed[0])
    assert {path.name for path in tmp_path.iterdir()} == {"round-1", "round-2"}


def test_a_failure_in_a_later_round_leaves_what_the_earlier_ones_came_to(tokens, monkeypatch):
    cut, calls = run_module.cut, []

    def fails_later(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return cut(*args, **kwargs)

    monkeypatch.setattr(run_module, "cut", fails_later)
    dense = tiny.make_model("llama_gqa_biases")
    for inplace in (False, True):
        calls.clear()
        pruner = FwdPruner(dense)
        with pytest.raises(RuntimeError, match="out of luck"):
            pruner.prune(tiny.request(sparsity=0.4, rounds=2), tokens, inplace=inplace)
        assert pruner.model(input_ids=tokens).logits.isfinite().all()
        assert (pruner.model is dense) == (not inplace) and (pruner.plan is None) == (not inplace)
        assert pruner.scores is not None


def test_options_of_given_scores_hold_in_every_round_and_in_the_record(tokens, monkeypatch):
    dense = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(dense)
    scores = pruner.score(tiny.request(method="taylor", salience="element"), tokens)
    asked = []
    score_units = run_module.score_units

    def watched(subject, job, *rest):
        asked.append(job.config.salience)
        return score_units(subject, job, *rest)

    monkeypatch.setattr(run_module, "score_units", watched)
    pruner.prune(tiny.request(method="taylor", sparsity=0.4, rounds=3), scores=scores)
    assert asked == ["element", "element"] and pruner.config.salience == "element"


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("sparsity", [0.18, 0.42, 0.5])
def test_heads_alone_come_to_the_same_in_rounds(rounds, sparsity):
    """Layers whose groups are down to one head close one after the other; the others give what is missing."""
    dense = tiny.make_model("llama_gqa_biases", num_hidden_layers=6)
    pruner = FwdPruner(dense)
    request = {"method": "magnitude", "reconstruction": "none", "scope": "global", "kinds": ["attention"]}
    pruner.prune(tiny.request(attention_sparsity=sparsity, rounds=rounds, **request), inplace=False)
    removed = sum(len(pruner.plan.removed((layer, "attention"))) for layer in range(6))
    # Three heads go at a time.
    assert removed == pytest.approx(sparsity * 36, abs=1.51)


def test_what_less_than_half_a_step_is_left_for_is_no_error():
    request = {"method": "magnitude", "reconstruction": "none", "kinds": ["attention"], "sparsity": 0.2}
    for rounds in (1, 2, 3):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(tiny.request(rounds=rounds, **request))
        assert all(len(pruner.plan.kept[layer, "attention"]) == 3 for layer in range(3))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.7, 0.78])
def test_layers_stay_even_over_rounds_where_groups_are_down_to_one_head(share, seed, tokens):
    """What such a layer gave counts, although its heads are no longer open."""
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=4)
    # Pruning consumes the sites.
    each = {site.key: site.unit_parameters for site in find_sites(model)}
    counts = {site.key: site.num_units for site in find_sites(model)}
    sizes = [sum(each[key] * counts[key] for key in each if key[0] == layer) for layer in range(4)]
    removed = int(share * sum(sizes))
    target = sum(parameter.numel() for parameter in model.parameters()) - removed
    pruner = FwdPruner(model)
    fields = {"method": "random", "reconstruction": "none", "budget": "joint", "rounds": 3, "seed": seed}
    pruner.prune(tiny.request(target_parameters=target, **fields), tokens)
    gone = {key: len(pruner.plan.removed(key)) * each[key] for key in each}
    shares = [sum(gone[key] for key in each if key[0] == layer) / sizes[layer] for layer in range(4)]
    assert max(shares) - min(shares) < 0.04 and sum(gone.values()) >= removed


@pytest.mark.parametrize("rounds", [2, 3, 8])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_heads_give_their_part_where_a_head_is_more_than_that_of_a_round(rounds, scope):
    """Rounded in every round anew, no heads would go and the MLPs would give for them."""
    dense = tiny.make_model("llama_gqa_biases", num_attention_heads=8, num_key_value_heads=2, intermediate_size=96)
    kept = {}
    for number in (1, rounds):
        pruner = FwdPruner(dense)
        request = {"method": "magnitude", "reconstruction": "none", "skip_layers": [], "scope": scope}
        pruner.prune(tiny.request(sparsity=0.27, rounds=number, **request), inplace=False)
        kept[number] = {
            kind: sum(len(units) for (_, of_kind), units in pruner.plan.kept.items() if of_kind == kind)
            for kind in ("attention", "mlp")
        }
    assert kept[1]["attention"] == 18
    assert kept[rounds]["attention"] == 18 and abs(kept[rounds]["mlp"] - kept[1]["mlp"]) <= 1


def gone(plan):
    return {(key.layer, key.kind) for key, kept in plan.kept.items() if not kept}


@pytest.mark.parametrize(
    ("kinds", "fields", "removed_units"),
    [
        (["layer"], {"method": "block_influence", "sparsity": 0.5}, 6),
        (["sublayer"], {"method": "removal_loss", "sparsity": 0.5}, 6),
        (["sublayer", "mlp"], {"depth_sparsity": 0.25, "sparsity": 0.4, "skip_layers": [2, -1]}, 3),
    ],
)
def test_layers_and_sublayers_go_in_rounds(kinds, fields, removed_units, tokens):
    """In every round a part of them, by the model that the last round left; in all as many as in one round."""
    dense = tiny.make_model("llama_gqa_biases", num_hidden_layers=6)
    sites = find_sites(dense)
    once, pruner = FwdPruner(dense), FwdPruner(dense)
    request = {"kinds": kinds, "reconstruction": "none", "inplace": False, **fields}
    once.prune(dataset=tokens, **request)
    pruned = pruner.prune(dataset=tokens, rounds=3, **request)

    assert len(gone(pruner.plan)) == len(gone(once.plan)) == removed_units
    if "mlp" in kinds:
        whole = sum(site.num_parameters for site in sites)
        assert removed(pruner.plan, sites) == pytest.approx(0.4 * whole, rel=0.02)
        assert all(len(pruner.plan.kept[layer, "mlp"]) == 64 for layer in (2, 5))
        assert not gone(pruner.plan) & {(layer, kind) for layer in (2, 5) for kind in ("attention", "mlp")}
    replayed = FwdPruner(dense).prune(plan=pruner.plan, inplace=False)
    for name, parameter in replayed.named_parameters():
        assert torch.equal(parameter, pruned.get_parameter(name)), name
    assert "layer" in str(pruner.report) and pruner.report.masked_difference < 1e-4


def test_an_earlier_round_removes_no_layer_that_exceeds_its_budget():
    """The next round decides whether the layer that does not fit is removed, also where a later one would fit."""
    sites = find_sites(tiny.make_model("llama_gqa_biases", num_hidden_layers=4))
    layer = sites[0].num_parameters + sites[1].num_parameters
    scores = {SiteKey(number, "layer"): torch.tensor([float(number)]) for number in range(4)}
    request = tiny.request("block_influence", kinds=["layer"], target_parameters=1)
    for share, kinds in ((0.9, []), (1, [0]), (1.9, [0]), (2, [0, 1])):
        budget = Budget(round(share * layer), at_most=True, as_far_as_possible=True)
        removed = removed_units(sites, scores, request, budget)
        assert [unit.key.layer for unit in removed] == kinds
    at_least = removed_units(sites, scores, request, Budget(round(1.1 * layer), at_least=True))
    assert [unit.key.layer for unit in at_least] == [0, 1]

    # The MLP does not fit, and the attention, which is smaller, does not go in its place.
    scores = {
        SiteKey(number, f"{kind}_sublayer"): torch.ones(1) for number in range(4) for kind in ("attention", "mlp")
    }
    scores[1, "mlp_sublayer"], scores[2, "attention_sublayer"] = torch.zeros(1), torch.full((1,), 0.5)
    budget = Budget(sites[0].num_parameters, at_most=True, as_far_as_possible=True)
    assert sites[0].num_parameters < sites[1].num_parameters
    assert not removed_units(sites, scores, dataclasses.replace(request, kinds=["sublayer"]), budget)


def test_a_layer_that_must_stay_keeps_one_of_its_sublayers():
    sites = find_sites(tiny.make_model("llama_gqa_biases"))
    sites = [dataclasses.replace(site, layer_stays=site.layer == 0) for site in sites]
    attention, mlp, *others = depth_units(sites, "sublayer")

    assert can_go(sites, [attention]) and can_go(sites, [mlp]) and can_go(sites, others)
    assert not can_go(sites, [attention, mlp])


@pytest.mark.parametrize(("skip_layers", "expected"), [(None, {0, 1, 2}), ([2], {0, 1, 3}), ([-6], {1, 2, 3})])
def test_later_rounds_choose_layers_by_the_model_that_is_left(skip_layers, expected, tokens, monkeypatch):
    """The first layer of the present model scores lowest, and `skip_layers` names layers of the dense one."""
    dense = tiny.make_model("llama_gqa_biases", num_hidden_layers=6)
    layers = []
    score_units = run_module.score_units

    def watched(subject, job, calibration, keep):
        layers.append(len({site.layer for site in subject.sites}))
        found = score_units(subject, job, calibration, keep)
        for key, value in found.values.items():
            value.fill_(key.layer)
        return found

    monkeypatch.setattr(run_module, "score_units", watched)
    pruner = FwdPruner(dense)
    request = {"kinds": ["layer"], "method": "block_influence", "sparsity": 0.5, "reconstruction": "none"}
    pruner.prune(dataset=tokens, rounds=3, skip_layers=skip_layers, **request)
    assert layers == [6, 5, 4]
    assert {layer for layer, _ in gone(pruner.plan)} == expected


@pytest.mark.parametrize("kinds", [["layer"], ["layer", "mlp"]])
def test_a_target_is_met_by_layers_in_rounds(kinds, tokens):
    dense = tiny.make_model("llama_gqa_biases", num_hidden_layers=6)
    pruner = FwdPruner(dense)
    fields = {"method": "random"} if kinds == ["layer"] else {"depth_sparsity": 0.2, "depth_method": "random"}
    pruner.prune(dataset=tokens, kinds=kinds, target_parameters=75_000, rounds=2, reconstruction="none", **fields)
    after = pruner.report.parameters_after
    # A layer has 14 thousand parameters, and a channel 150.
    assert 75_000 - (14_500 if kinds == ["layer"] else 300) < after <= 75_000


def test_layers_that_are_more_than_the_budget_are_told(tokens, caplog):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=6))
    pruner.prune(dataset=tokens, kinds=["layer", "mlp"], depth_sparsity=0.5, sparsity=0.4)
    assert pruner.report.sparsity == pytest.approx(0.5)
    assert "depth_sparsity=0.5 removes are 1.25 times the whole budget" in caplog.text
