"""Experts together with heads, layers and sublayers of a mixture, in one request."""

import pytest
import tiny_mixtures
import torch
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.export import export_stock
from optimum_fwdprune.forward.gates import gated
from optimum_fwdprune.report.sentences import how_units_were_chosen


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def active(model):
    return parameters(model) - sum(site.idle_parameters for site in find_sites(model))


@torch.no_grad()
def logits_of_masked(name, plan, tokens):
    dense = tiny_mixtures.make_mixture(name)
    sites = find_sites(dense, plan.attention_unit)
    with gated(sites, {site.key: site.unit_mask(plan.kept[site.key]) for site in sites}):
        return dense(tokens).logits


HEADS = {"kinds": ["expert", "attention"], "attention_unit": "kv_group", "reconstruction": "none", "sparsity": 0.5}
LAYERS = {"kinds": ["expert", "layer"], "depth_sparsity": 0.34, "reconstruction": "none", "sparsity": 0.5}
SUBLAYERS = {**LAYERS, "kinds": ["expert", "sublayer"], "depth_method": "magnitude", "expert_sparsity": 0.25}
# What is asked of a mixture, and what is left: experts of every layer, KV groups, layers.
ASKED = {
    "experts and heads": ("mixtral", {**HEADS, "method": "wanda_sp"}, (4, 1, 3)),
    "experts and layers": ("mixtral", LAYERS, (6, 4, 2)),
    "experts and sublayers": ("deepseek_v3", SUBLAYERS, (6, 4, 3)),
    "all": ("mixtral", {**HEADS, "kinds": ["attention", "layer", "expert"], "depth_sparsity": 0.34}, (6, 2, 2)),
    "own shares": ("gpt_oss", {**HEADS, "expert_sparsity": 0.25, "expert_method": "expert_frequency"}, (6, 1, 3)),
}


@torch.no_grad()
@pytest.mark.parametrize("case", ASKED)
def test_masked_equals_sliced_equals_reloaded(case, tokens, tmp_path):
    name, request, left = ASKED[case]
    pruner = FwdPruner(tiny_mixtures.make_mixture(name))
    pruned = pruner.prune(None, tokens, **request)
    pruner.save_pretrained(tmp_path / "pruned")

    masked = logits_of_masked(name, pruner.plan, tokens)
    assert (pruned(tokens).logits - masked).abs().max() <= 1e-4 * masked.abs().max()
    kept = {
        kind: {len(units) for key, units in pruner.plan.kept.items() if key.kind == kind and units}
        for kind in ("expert", "attention")
    }
    assert (kept["expert"], kept["attention"], pruned.config.num_hidden_layers) == ({left[0]}, {left[1]}, left[2])
    folder = tmp_path / "pruned"
    if "sublayer" not in request["kinds"] and pruned.config.model_type.startswith("pruned_"):
        folder = export_stock(pruned, None, tmp_path / "stock")
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(reloaded(tokens).logits, pruned(tokens).logits, rtol=1e-5, atol=1e-5)
    if "sublayer" not in request["kinds"]:
        assert type(reloaded) is type(tiny_mixtures.make_mixture(name))


def test_every_method_scores_its_own_kind(tokens):
    dense = tiny_mixtures.make_mixture("mixtral")
    request = {"reconstruction": "none", "sparsity": 0.5}
    methods = {"method": "magnitude", "expert_method": "expert_frequency", "depth_method": "removal_loss"}
    pruner = FwdPruner(dense)
    pruner.prune(
        None, tokens, kinds=["attention", "expert", "layer"], depth_sparsity=0.34, **methods, **request, inplace=False
    )
    alone = {
        kind: FwdPruner(dense).score(dataset=tokens, kinds=[kind], method=method, **request).values
        for kind, method in zip(("attention", "expert", "layer"), methods.values())
    }

    for key, values in pruner.scores.values.items():
        if key.kind in alone and key.kind != "layer":
            assert torch.equal(values, alone[key.kind][key])
    assert pruner.plan.metadata["scoring"]["depth"]["removed"]
    lowest = min((0, 1, 2), key=lambda layer: float(alone["layer"][(layer, "layer")]))
    assert pruner.plan.kept[(lowest, "attention")] == [] and pruner.plan.kept[(lowest, "expert")] == []
    card = "".join(sentence for sentence in how_units_were_chosen(pruner._record))
    assert "`removal_loss` chose the layers, `expert_frequency` chose the experts, and `magnitude` the rest" in card


def test_targets_count_the_whole_model_or_what_a_token_uses(tokens):
    dense = tiny_mixtures.make_mixture("mixtral")
    request = {"method": "magnitude", "reconstruction": "none", "attention_unit": "kv_group", "inplace": False}

    def pruned(**fields):
        return FwdPruner(dense).prune(None, tokens, **request, **fields)

    target = int(0.7 * parameters(dense))
    both = pruned(kinds=["expert", "attention"], target_parameters=target)
    assert 0.9 * target < parameters(both) <= target and both.config.num_local_experts == 4
    # As few layers as possible: none where experts and heads are enough.
    for share, layers in ((0.7, 3), (0.4, 2)):
        model = pruned(kinds=["expert", "layer", "attention"], target_parameters=int(share * parameters(dense)))
        assert parameters(model) <= share * parameters(dense) and model.config.num_hidden_layers == layers
    target = int(0.92 * active(dense))
    model = pruned(kinds=["expert", "attention"], target_active_parameters=target, expert_sparsity=0.5)
    assert 0.85 * target < active(model) <= target and model.config.num_local_experts == 4
    target = int(0.82 * active(dense))
    model = FwdPruner(dense).prune(
        None,
        tokens,
        kinds=["expert", "layer"],
        target_active_parameters=target,
        expert_sparsity=0.5,
        reconstruction="none",
        inplace=False,
    )
    assert active(model) <= target
    assert (model.config.num_local_experts, model.config.num_hidden_layers) == (4, 2)


def test_least_squares_makes_up_for_heads_and_experts(tokens):
    request = {"kinds": ["expert", "attention"], "sparsity": 0.5, "attention_unit": "kv_group"}
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral"))
    pruner.prune(None, tokens, **request)

    details = pruner.plan.metadata["reconstructed"]
    assert {key.partition(".")[2] for key in details} == {"attention", "expert"}
    assert sum(detail["refitted"] for detail in details.values()) > 3


REFUSED = [
    ({"kinds": ["expert", "layer"]}, "Set depth_sparsity .* or a target"),
    ({"kinds": ["expert"], "expert_sparsity": 0.2}, "Use sparsity, or add the others to kinds"),
    ({"kinds": ["expert", "layer"], "depth_sparsity": 0.2, "expert_method": "reap"}, "Use method, or add the others"),
    ({"kinds": ["mlp"], "expert_method": "reap"}, "expert_method is for experts in addition to heads or channels"),
    ({"kinds": ["expert", "attention"], "expert_method": "flap"}, "expert_method='flap' scores attention, mlp"),
    ({"kinds": ["expert", "attention"], "method": "reap"}, "method='reap' scores expert and not attention"),
    ({"kinds": ["expert", "attention"], "method": "policy_gradient"}, "does not learn how the budget is split"),
    ({"kinds": ["expert"], "method": "policy_gradient"}, "scores attention, mlp, layer, sublayer and not expert"),
    ({"kinds": ["expert", "attention"], "scope": "search"}, "same number of experts"),
    ({"kinds": ["expert", "attention"], "target_active_parameters": 9}, "Set target_parameters, or expert_sparsity"),
    ({"kinds": ["expert", "attention"], "expert_sparsity": 0.2, "max_divergence": 1.0}, "two budgets"),
    ({"kinds": ["expert", "attention"], "expert_sparsity": 1.2}, r"expert_sparsity must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_contradictions_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**fields)


def test_shares_that_no_router_can_work_with_are_refused_with_the_numbers(tokens):
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral"))
    request = {"kinds": ["expert", "attention"], "reconstruction": "none", "method": "magnitude"}
    with pytest.raises(
        ValueError, match=r"expert_sparsity=0.9 leaves 1 of 8 .* largest possible expert_sparsity is 0.75"
    ):
        pruner.prune(None, tokens, expert_sparsity=0.9, **request)
    request = {"kinds": ["expert", "layer"], "depth_sparsity": 0.0, "expert_sparsity": 0.25}
    with pytest.raises(ValueError, match=r"needs more than the 2 of 8 experts that expert_sparsity=0.25 removes"):
        pruner.prune(None, tokens, target_parameters=40_000, **request)
