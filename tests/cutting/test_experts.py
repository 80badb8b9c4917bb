"""Mixtures without some of their experts: masked = sliced = reloaded by transformers alone, for every family."""

import subprocess

import pytest
import tiny_mixtures
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.forward.gates import gated


# Three of every group where there are two groups of four.
KEPT = [0, 2, 3, 4, 6, 7]

# One thread, so that sums have the same order as here.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

# The names of a router, an expert and its correction in the checkpoints that a family's authors publish.
STORED = {
    "mixtral": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.5.w2.weight"),
    "qwen2_moe": ("mlp.gate.weight", "mlp.experts.5.down_proj.weight"),
    "qwen3_moe": ("mlp.gate.weight", "mlp.experts.5.down_proj.weight"),
    "olmoe": ("mlp.gate.weight", "mlp.experts.5.down_proj.weight"),
    "gpt_oss": ("mlp.router.bias", "mlp.experts.gate_up_proj_bias"),
    "glm4_moe": ("mlp.gate.e_score_correction_bias", "mlp.experts.5.gate_proj.weight"),
    "deepseek_v3": ("mlp.gate.e_score_correction_bias", "mlp.experts.5.gate_proj.weight"),
    "phimoe": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.5.w1.weight"),
    "granitemoe": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.input_linear.weight"),
}


def plan_keeping(model, kept, layers_gone=(), sublayers_gone=(), heads=None):
    """A plan that keeps these experts of every mixture, and all or every other unit of other sites."""

    def units(site):
        if site.layer in layers_gone or site.key in sublayers_gone:
            return []
        if site.kind == "expert":
            return list(kept)
        return list(range(0, site.num_units, 2 if site.kind == "attention" and heads else 1))

    sites = find_sites(model, heads or "query_head")
    counts = {site.key: site.num_units for site in sites}
    return PruningPlan(
        {site.key: units(site) for site in sites}, counts, model.config.model_type, heads or "query_head"
    )


def masks_of(sites, plan):
    return {site.key: site.unit_mask(plan.kept[site.key]) for site in sites}


@torch.no_grad()
def logits_of_masked(model, plan, tokens):
    sites = find_sites(model, plan.attention_unit)
    with gated(sites, masks_of(sites, plan)):
        return model(tokens).logits


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_mixtures.CONFIGS)
def test_masked_equals_sliced_equals_reloaded_as_a_stock_checkpoint(name, tokens, tmp_path):
    dense = tiny_mixtures.make_mixture(name)
    stock_class, whole = type(dense), dense(tokens).logits
    plan = plan_keeping(dense, KEPT)
    masked = logits_of_masked(dense, plan, tokens)
    routers = {site.layer: site.routing.router.weight.clone() for site in find_sites(dense) if site.routing}
    pruner = FwdPruner(dense)
    pruned = pruner.prune(plan=plan)

    assert type(pruned) is stock_class
    assert (pruned(tokens).logits - masked).abs().max() <= 1e-4 * masked.abs().max()
    # The check above means something only if other experts took over.
    assert (whole - masked).abs().max() > 1e-2 * whole.abs().max()
    for site in find_sites(pruned):
        if site.routing:
            assert torch.equal(site.routing.router.weight, routers[site.layer][KEPT])

    pruner.save_pretrained(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert type(reloaded) is stock_class
    assert torch.equal(reloaded(tokens).logits, pruned(tokens).logits)
    names = load_file(tmp_path / "pruned" / "model.safetensors").keys()
    last = f"model.layers.{pruned.config.num_hidden_layers - 1}."
    assert {last + stored for stored in STORED[name]} <= names
    again = FwdPruner.from_pretrained(tmp_path / "pruned")
    assert again.plan.kept == plan.kept and again.report is not None


@torch.no_grad()
def test_a_process_without_this_package_loads_what_is_left(tokens, tmp_path, python_without_the_package):
    pruner = FwdPruner(tiny_mixtures.make_mixture("deepseek_v3"))
    pruned = pruner.prune(plan=plan_keeping(pruner.model, KEPT))
    pruner.save_pretrained(tmp_path / "pruned")
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import importlib.util, torch, transformers\n"
        "assert importlib.util.find_spec('optimum_fwdprune') is None\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('pruned')\n"
        "with torch.no_grad(): torch.save(model(torch.load('tokens.pt')).logits, 'logits.pt')\n"
    )
    subprocess.run([python_without_the_package, "-c", code], cwd=tmp_path, check=True, env=ENVIRONMENT)

    assert torch.equal(torch.load(tmp_path / "logits.pt"), pruned(tokens).logits)


@torch.no_grad()
def test_mixtures_without_heads_and_sublayers_load_as_remote_code(tokens, tmp_path, python_without_the_package):
    expected = {}
    for name in tiny_mixtures.CONFIGS:
        dense = tiny_mixtures.make_mixture(name)
        heads = None if find_sites(dense)[0].fixed else "kv_group"
        pruner = FwdPruner(dense)
        pruned = pruner.prune(plan=plan_keeping(dense, KEPT, sublayers_gone=[(0, "attention")], heads=heads))
        pruner.save_pretrained(tmp_path / name)
        assert pruned.config.model_type == f"pruned_{name}"
        expected[name] = pruned(tokens).logits
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import torch, transformers, sys\n"
        "for name in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)\n"
        "    with torch.no_grad(): torch.save(model(torch.load('tokens.pt')).logits, name + '.pt')\n"
    )
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "cache")}
    command = [python_without_the_package, "-c", code, *expected]
    subprocess.run(command, cwd=tmp_path, check=True, env=environment)

    for name, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), logits), name


@torch.no_grad()
def test_a_mask_per_sequence_closes_experts_in_this_sequence_only(tokens):
    dense = tiny_mixtures.make_mixture("glm4_moe")
    sites = find_sites(dense)
    plan = plan_keeping(dense, KEPT)
    masks = {key: torch.stack([torch.ones_like(mask), mask]) for key, mask in masks_of(sites, plan).items()}
    with gated(sites, masks):
        logits = dense(tokens[:2]).logits

    torch.testing.assert_close(logits[:1], dense(tokens[:1]).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1:], logits_of_masked(dense, plan, tokens[1:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe", "granitemoe"])
def test_heads_layers_and_sublayers_of_mixtures_are_removed_as_in_dense_models(name, tokens, tmp_path):
    dense = tiny_mixtures.make_mixture(name)
    gone = [(2, "attention")]
    plan = plan_keeping(dense, range(8), layers_gone=[0], sublayers_gone=gone, heads="kv_group")
    masked = logits_of_masked(dense, plan, tokens)
    pruned = FwdPruner(dense).prune(plan=plan)

    assert pruned.config.num_hidden_layers == 2
    # Not one expert after the other, as classes do that transformers does not know.
    assert pruned.config._experts_implementation == "grouped_mm"
    assert (pruned(tokens).logits - masked).abs().max() <= 1e-4 * masked.abs().max()
    pruned.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(tokens).logits, pruned(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_mixture_as_a_whole_is_removed_like_an_mlp(name, tokens):
    dense = tiny_mixtures.make_mixture(name)
    plan = plan_keeping(dense, range(8), sublayers_gone=[(1, "expert"), (2, "expert")])
    masked = logits_of_masked(dense, plan, tokens)
    pruned = FwdPruner(dense).prune(plan=plan)

    assert (pruned(tokens).logits - masked).abs().max() <= 1e-4 * masked.abs().max()
    assert pruned.config.per_layer_config[1].skip == ["mlp"]


@torch.no_grad()
def test_experts_and_then_heads_compose_to_one_plan_for_the_dense_model(tokens, tmp_path):
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral"))
    pruner.prune(plan=plan_keeping(pruner.model, KEPT))
    pruner.save_pretrained(tmp_path / "experts")
    pruner = FwdPruner.from_pretrained(tmp_path / "experts")
    now = plan_keeping(pruner.model, [0, 1, 3, 5], heads="kv_group")
    twice = pruner.prune(plan=now)

    assert twice.config.model_type == "pruned_mixtral" and twice.config.num_local_experts == 4
    assert pruner.plan.kept[(0, "expert")] == [KEPT[place] for place in (0, 1, 3, 5)]
    once = FwdPruner(tiny_mixtures.make_mixture("mixtral")).prune(plan=pruner.plan)
    torch.testing.assert_close(once(tokens).logits, twice(tokens).logits)


REFUSED_PLANS = {
    "different numbers": ("mixtral", {(1, "expert"): [0, 1, 2, 3]}, "4 experts in layer 1 and 6 in layer 0"),
    "too few": ("mixtral", {(layer, "expert"): [5] for layer in range(3)}, "a token uses 2 of them"),
    "unequal groups": ("deepseek_v3", {(1, "expert"): [0, 1, 2, 4, 5]}, r"keeps \[3, 2\] experts per group"),
    "too few of a group": ("deepseek_v3", {(layer, "expert"): [0, 4] for layer in (1, 2)}, "4 is the smallest number"),
    "channels of a dense layer": ("glm4_moe", {(0, "mlp"): [0, 1]}, "cannot lose: its layers have experts"),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_plans_that_no_router_can_work_with_are_refused(case, monkeypatch):
    name, changes, message = REFUSED_PLANS[case]
    dense = tiny_mixtures.make_mixture(name)
    plan = plan_keeping(dense, KEPT)
    plan = PruningPlan(plan.kept | changes, plan.num_units, plan.model_type, plan.attention_unit)
    monkeypatch.setattr(type(dense.base_model), "forward", None)
    with pytest.raises(ValueError, match=message):
        FwdPruner(dense).prune(plan=plan)


def test_a_router_that_computes_its_scores_in_another_way_is_an_error(monkeypatch, tokens):
    dense = tiny_mixtures.make_mixture("mixtral")
    sites = find_sites(dense)
    router = type(sites[1].routing.router)
    monkeypatch.setattr(router, "forward", lambda self, hidden: (None, hidden[:, :2], torch.zeros(1, 2).long()))
    with (
        pytest.raises(RuntimeError, match="computed the scores by which it chooses experts 0 times"),
        gated(sites, {sites[1].key: torch.ones(8)}),
    ):
        dense(tokens)


@pytest.mark.parametrize("heads", [None, "kv_group"])
def test_experts_run_by_the_implementation_of_the_dense_model_and_can_be_set_to_another(heads):
    dense = tiny_mixtures.make_mixture("mixtral")
    dense.set_experts_implementation("batched_mm")
    pruned = FwdPruner(dense).prune(plan=plan_keeping(dense, KEPT, heads=heads))

    configs = [site.routing.experts.config for site in find_sites(pruned) if site.routing]
    assert {config._experts_implementation for config in configs} == {"batched_mm"}
    pruned.set_experts_implementation("eager")
    assert {config._experts_implementation for config in configs} == {"eager"}
