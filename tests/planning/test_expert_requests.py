"""Requests for experts: what they mean for a mixture, and refusals with numbers before any work."""

import json

import pytest
import tiny
import tiny_mixtures
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.forward.memory import memory_of
from optimum_fwdprune.sweep import Measures


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_mixture_loses_experts_by_reap_unless_kinds_are_named_and_the_log_says_so(tokens, caplog):
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral"))
    pruner.prune(None, tokens, sparsity=0.25)

    assert "This model is a mixture of experts, so that experts are pruned" in caplog.text
    assert (pruner.config.kinds, pruner.config.method) == (["expert"], "reap")
    assert pruner.model.config.num_local_experts == 6
    assert pruner.report.sparsity == pytest.approx(0.25)
    assert PruningConfig(kinds=["expert"]).method == "reap"


def test_the_sparsity_is_the_share_of_the_experts_rounded(tokens, caplog):
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral"))
    pruner.prune(None, tokens, kinds=["expert"], sparsity=0.3)

    assert pruner.model.config.num_local_experts == 6
    assert "sparsity=0.3 becomes 0.25 for this model" in caplog.text


def test_a_target_counts_all_parameters_and_rounds_to_fewer(tokens):
    dense = tiny_mixtures.make_mixture("qwen3_moe")
    site = find_sites(dense)[-1]
    target = parameters(dense) - 2 * 2 * site.unit_parameters
    for wanted, left in ((target, 6), (target + 1, 6), (target - 1, 5)):
        pruned = FwdPruner(dense).prune(None, tokens, kinds=["expert"], target_parameters=wanted, inplace=False)
        assert pruned.config.num_experts == left and parameters(pruned) <= wanted


def test_a_target_of_active_parameters_counts_what_a_token_uses(tokens):
    dense = tiny_mixtures.make_mixture("mixtral")
    idle = sum(site.idle_parameters for site in find_sites(dense))
    experts = dense.model.layers[0].mlp.experts
    assert idle == 3 * 6 * sum(parameter[0].numel() for parameter in experts.parameters())

    of_a_layer = sum(site.all_parameters - site.idle_parameters for site in find_sites(dense) if site.layer == 1)
    target = parameters(dense) - idle - of_a_layer
    pruner = FwdPruner(dense)
    pruned = pruner.prune(None, tokens, method="random", kinds=["layer"], target_active_parameters=target)
    left = sum(site.idle_parameters for site in find_sites(pruned))
    assert pruned.config.num_hidden_layers == 2
    assert parameters(pruned) - left <= target < parameters(pruned)


def test_the_share_of_heads_refers_to_the_heads(tokens):
    pruner = FwdPruner(tiny_mixtures.make_mixture("qwen3_moe"))
    pruner.prune(None, tokens, kinds=["attention"], sparsity=0.5, attention_unit="kv_group")

    assert [len(pruner.plan.kept[(layer, "attention")]) for layer in range(3)] == [1, 1, 1]


def test_the_fewest_experts_within_a_limit_of_quality_are_kept(tokens):
    pruner = FwdPruner(tiny_mixtures.make_mixture("deepseek_v3"))
    pruner.prune(None, tokens, kinds=["expert"], max_divergence=0.05, reconstruction="none", n_samples=8)

    found = pruner.plan.metadata["scoring"]["quality"]
    assert pruner.model.config.n_routed_experts == 6
    assert found["measured"] <= 0.05 < max(measured for _, measured in found["tried"])


@pytest.mark.parametrize(
    ("name", "kinds"), [("mixtral", ["expert"]), ("gpt_oss", ["expert"]), ("mixtral", ["attention", "expert"])]
)
def test_a_target_of_memory_counts_weights_cache_and_activations(name, kinds):
    dense = tiny_mixtures.make_mixture(name)
    target = int(0.85 * memory_of(dense, 2, 50).total)
    request = {"method": "magnitude", "reconstruction": "none", "attention_unit": "kv_group"}
    pruner = FwdPruner(dense)
    pruned = pruner.prune(target_memory=target, context_tokens=50, serving_batch=2, kinds=kinds, **request)

    memory = memory_of(pruned, 2, 50)
    assert memory.weights == sum(parameter.nbytes for parameter in pruned.parameters())
    assert 0.85 * target < memory.total <= target
    assert pruner.plan.metadata["memory"]["activations"] == memory.activations


def test_a_sweep_of_a_mixture_removes_experts(tokens, tokenizer, tmp_path):
    measures = Measures({"fox": ["the quick brown fox jumps over the lazy dog " * 9]}, max_length=32, speed=False)
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral"), tokenizer)
    sizes = {"sparsity": [0.25, 0.5], "method": ["reap", "random"]}
    rows = pruner.sweep(tmp_path / "s", None, tokens, measures=measures, keep=[0.5], **sizes).rows

    # REAP scores nothing but experts, so that its requests need no kinds.
    assert {(row.request["method"], *(row.request["kinds"] or [])) for row in rows} == {
        ("reap",),
        ("random", "expert"),
    }
    for row in rows:
        config = json.loads((tmp_path / "s" / row.name / "config.json").read_text()) if "0.5" in row.name else {}
        assert config.get("num_local_experts", 4) == 4


REFUSED = {
    "fewer than a token uses": ("mixtral", {"sparsity": 0.9}, r"leaves 1 of 8 experts .* uses 2 .* sparsity is 0\.75"),
    "fewer than a group needs": ("deepseek_v3", {"sparsity": 0.75}, r"from groups, of which there are 2.* is 0\.5"),
    "a target": ("mixtral", {"target_parameters": 10}, "leaves 0 of 8 experts in every layer"),
    "the least that is kept": ("mixtral", {"sparsity": 0.5, "min_units_per_site": 5}, "min_units_per_site=5"),
    "channels": ("mixtral", {"kinds": ["mlp"]}, r"MLP channels, which this mixtral does not have: its layers have"),
    "channels beside experts": ("olmoe", {"kinds": ["expert", "mlp"]}, r"MLP channels.* Use kinds=\['expert'\]"),
    "channels of dense layers": ("glm4_moe", {"kinds": ["mlp"]}, "MLP channels, which this glm4_moe cannot lose"),
    "heads": ("olmoe", {"kinds": ["attention"]}, r"query and key norms .* Use kinds=\['expert'\]"),
    "latent heads": ("deepseek_v3", {"kinds": ["attention"]}, "multi-head latent attention"),
    "another method": ("mixtral", {"method": "flap"}, "scores attention, mlp and not expert"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_mixture_cannot_lose_is_refused_before_any_work(case, monkeypatch, tokens):
    name, fields, message = REFUSED[case]
    pruner = FwdPruner(tiny_mixtures.make_mixture(name))
    before = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
    monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", None)
    with pytest.raises(ValueError, match=message):
        pruner.prune(None, tokens, **fields)
    assert all(torch.equal(before[name], tensor) for name, tensor in pruner.model.state_dict().items())


def test_a_dense_model_has_no_experts(tokens):
    with pytest.raises(ValueError, match=r"asks for experts, which this llama does not have.*kinds="):
        FwdPruner(tiny.make_model("llama_mqa")).prune(None, tokens, kinds=["expert"])


@pytest.mark.parametrize(
    "fields",
    [
        {"scope": "global"},
        {"skip_layers": [0]},
        {"rounds": 2},
        {"target_speedup": 1.5},
        {"target_active_parameters": 100},
        {"reconstruction": "bias"},
        {"refit_sources": True},
    ],
)
def test_options_that_have_no_meaning_for_experts_are_refused(fields):
    with pytest.raises(ValueError, match="expert"):
        PruningConfig(**{"kinds": ["expert"], **fields})
