"""The invariants of docs/contributing/design.md that hold in one process.

`sliced = reloaded` is in loading/test_loading.py.
"""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, find_sites


RECONSTRUCTIONS = ("none", "bias", "least_squares")


@pytest.fixture(params=["layer", "global"])
def scope(request):
    """Every layer alike, and layers of different sizes."""
    return request.param


@pytest.fixture(params=["kv_group", "query_head"])
def attention_unit(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize(
    *tiny.crossed(tiny.CONFIGS, scope=["layer", "global"], attention_unit=["kv_group", "query_head"])
)
def test_masked_equals_sliced(architecture_name, dense, tokens, scope, attention_unit):
    probe = tokens[:4]
    pruner = FwdPruner(dense)
    fields = {"scope": scope, "attention_unit": attention_unit, "kinds": tiny.kinds_of(architecture_name)}
    config = tiny.request(sparsity=0.4, reconstruction="none", **fields)
    pruned = pruner.prune(config, tokens, inplace=False)
    expected = tiny.masked_by_hand(dense, pruner.plan)(probe).logits

    actual = pruned(probe).logits

    assert any(len(kept) < pruner.plan.num_units[key] for key, kept in pruner.plan.kept.items())
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    # The check above means something only if pruning changed the outputs far beyond rounding.
    assert (dense(probe).logits - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_reconstructed_weights_reach_the_pruned_model(dense, tokens, reconstruction):
    pruner = FwdPruner(dense)
    config = tiny.request(method="wanda_sp", sparsity=0.4, reconstruction=reconstruction)
    pruned = pruner.prune(config, tokens, inplace=False)
    masked = tiny.masked_by_hand(dense, pruner.plan)

    # On its calibration tokens a layer's projection is closer to the dense one than without reconstruction.
    def first_outputs(model, name):
        outputs = []
        site = next(site for site in find_sites(model) if site.kind == name and site.layer == 0)
        handle = site.projection.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        model(tokens)
        handle.remove()
        return outputs[0]

    # Layer 0's attention sees the same inputs in all three models.
    target = first_outputs(dense, "attention")
    lost = (first_outputs(masked, "attention") - target).square().sum()
    left = (first_outputs(pruned, "attention") - target).square().sum()
    if reconstruction == "none" or lost == 0:
        assert torch.isclose(left, lost, rtol=1e-3, atol=1e-6)
    else:
        assert left < lost


def test_budget_is_met_within_one_unit(dense, tokens, scope, attention_unit):
    for sparsity in (0.1, 0.25, 0.5):
        pruner = FwdPruner(dense)
        sites = find_sites(dense, attention_unit)
        # What stays is settled before anything is reconstructed.
        fields = {"scope": scope, "attention_unit": attention_unit, "reconstruction": "none"}
        pruner.prune(tiny.request(sparsity=sparsity, **fields), tokens, inplace=False)
        layers = {site.layer for site in sites}
        pools = [[site for site in sites if site.layer == layer] for layer in layers] if scope == "layer" else [sites]
        for pool in pools:
            prunable = sum(site.num_units * site.unit_parameters for site in pool)
            removed = sum(len(pruner.plan.removed(site.key)) * site.unit_parameters for site in pool)
            # A channel is the smallest unit; one of rounding stands for the integer target.
            channel = min(site.unit_parameters for site in pool)
            assert abs(removed - sparsity * prunable) <= channel + 1


def test_reported_sizes_are_those_of_the_model(dense, tokens):
    before = sum(parameter.numel() for parameter in dense.parameters())
    pruner = FwdPruner(dense)
    pruned = pruner.prune(tiny.request(sparsity=0.3, reconstruction="none"), tokens)
    after = sum(parameter.numel() for parameter in pruned.parameters())

    assert pruner.report.parameters_before == before
    assert pruner.report.parameters_after == after
    assert pruner.report.removed_parameters == before - after
    assert pruner.report.sparsity == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("method", tiny.methods_of_dense_models())
def test_same_seed_gives_the_same_plan(method, tokenizer):
    def plan(seed):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
        calibration = {"calibration": "builtin", "n_samples": 4, "seq_len": 32}
        own = tiny.SHORT.get(method, {})
        scope = {} if tiny.kinds_scored_by(method) == ["layer"] else {"scope": "global"}
        config = tiny.request(method=method, sparsity=0.4, seed=seed, **scope, **calibration, **own)
        pruner.prune(config)
        return pruner.plan.kept

    assert plan(seed=3) == plan(seed=3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_pruned_in_their_own_dtype(dense, tokens, dtype):
    pruner = FwdPruner(dense.to(dtype))
    pruned = pruner.prune(tiny.request(method="flap", sparsity=0.4), tokens)

    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    assert pruned(tokens[:2]).logits.isfinite().all()


def test_every_layer_gives_the_same_share_with_scope_layer(dense, tokens):
    pruner = FwdPruner(dense)
    pruner.prune(tiny.request(sparsity=0.4, scope="layer"), tokens)
    shapes = {}
    for (_, kind), kept in pruner.plan.kept.items():
        shapes.setdefault(kind, set()).add(len(kept))

    assert all(len(sizes) == 1 for sizes in shapes.values())
    assert len(pruner.plan.kept[(0, "mlp")]) < pruner.plan.num_units[(0, "mlp")]


def test_surgery_frees_the_dense_tensors_as_it_goes(dense, tokens):
    """Its peak is the dense model and one tensor: cut tensors are emptied, the others are shared."""
    pruner = FwdPruner(dense)
    pruned = pruner.prune(tiny.request(sparsity=0.4, reconstruction="none"), tokens)
    shared = {parameter.data_ptr() for parameter in pruned.parameters()}

    for name, parameter in dense.named_parameters():
        assert parameter.numel() == 0 or parameter.data_ptr() in shared, name
