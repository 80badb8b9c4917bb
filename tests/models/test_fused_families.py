"""What families with fused rows, ALiBi or parallel blocks have of their own; the invariants of all run elsewhere."""

import pytest
import tiny
import torch
import transformers
from transformers.models.falcon import modeling_falcon

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.data.calibration import Calibration
from optimum_fwdprune.forward.layerwise import LayerRunner, decoder_layers
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.models.resizing import resize_layer
from optimum_fwdprune.reconstruction.joining import Joining


# All forms of Falcon's attention, with ALiBi.
ALIBI = {
    "one KV head": ("falcon_multi_query", {}),
    "KV groups": ("falcon_grouped", {"num_ln_in_parallel_attn": 1}),
    "a KV head for every head": ("falcon_alibi", {}),
    "a KV head for every head, parallel": ("falcon_alibi", {"parallel_attn": True}),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "changes"), ALIBI.values(), ids=ALIBI)
@torch.no_grad()
def test_kept_heads_of_falcon_keep_their_slopes(name, changes, implementation, tokens, tmp_path):
    dense = tiny.make_model(name, alibi=True, attn_implementation=implementation, **changes)
    pruner = FwdPruner(dense)
    once = pruner.prune(tiny.request(sparsity=0.3, scope="global", reconstruction="none"), tokens, inplace=False)
    expected = tiny.masked_by_hand(dense, pruner.plan)(tokens).logits
    first = [layer.kept_heads for layer in once.config.per_layer_config]
    once.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)

    assert dense.config._attn_implementation == implementation
    assert (loaded(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert first == [pruner.plan.kept[layer, "attention"] for layer in range(3)]
    # The ids are those of the dense model, however often a model is pruned.
    pruner = FwdPruner(loaded)
    twice = pruner.prune(tiny.request(sparsity=0.3, scope="global", reconstruction="none"), tokens, inplace=False)
    second = [layer.kept_heads for layer in twice.config.per_layer_config]
    assert second == [
        [heads[unit] for unit in pruner.plan.kept[layer, "attention"]] for layer, heads in enumerate(first)
    ]
    assert second != first


@torch.no_grad()
def test_kv_groups_of_falcon_keep_the_slopes_of_their_heads(tokens):
    dense = tiny.make_model("falcon_grouped", alibi=True)
    pruner = FwdPruner(dense)
    config = tiny.request(sparsity=0.5, scope="layer", attention_unit="kv_group", reconstruction="none")
    pruned = pruner.prune(config, tokens, inplace=False)
    expected = tiny.masked_by_hand(dense, pruner.plan)(tokens).logits

    assert (pruned(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    for layer, layer_config in enumerate(pruned.config.per_layer_config):
        (group,) = pruner.plan.kept[layer, "attention"]
        assert layer_config.kept_heads == [3 * group, 3 * group + 1, 3 * group + 2]


def test_an_attention_class_that_needs_no_pruned_one_stays():
    dense = tiny.make_model("falcon_multi_query")
    layout = get_architecture(dense.config).layout
    pruned = FwdPruner(dense).prune(method="magnitude", reconstruction="none", kinds=["mlp"], inplace=False)
    layer = decoder_layers(dense)[0]
    layer.self_attention = modeling_falcon.FalconFlashAttention2(dense.config, 0)
    resize_layer(layer, layout, pruned.config.per_layer_config[0])

    assert type(layer.self_attention) is modeling_falcon.FalconFlashAttention2
    assert type(decoder_layers(pruned)[0].self_attention).__name__ == "PrunedFalconAttention"


@torch.no_grad()
def test_every_block_of_codegen_keeps_as_many_heads(tokens):
    pruner = FwdPruner(tiny.make_model("codegen"))
    pruner.prune(tiny.request(sparsity=0.4, scope="global", reconstruction="none"), tokens)
    kept = [units for (_, kind), units in pruner.plan.kept.items() if kind == "attention"]

    assert {len(units) for units in kept} == {4, 8}
    assert all(torch.bincount(torch.tensor(units) // 2).unique().numel() == 1 for units in kept)
    pruner.plan.kept[0, "attention"] = [0, 1, 2, 4]
    with pytest.raises(ValueError, match="group"):
        FwdPruner(tiny.make_model("codegen")).prune(plan=pruner.plan)


@pytest.mark.parametrize("name", tiny.CONFIGS)
@torch.no_grad()
def test_the_declared_residual_stream_is_the_one_that_layers_compute(name, tokens):
    """What reconstruction towards the dense model reads: the stream is the sum of what projections write, attention
    first, by way of the norms that are declared."""
    dense = tiny.make_model(name)
    adds_up = get_architecture(dense.config).layout.residual_adds_up(dense.config)
    joining = Joining.of(Subject.of(dense))
    runner, written = LayerRunner(dense), []
    (batch,) = runner.batches(Calibration(tokens), len(tokens))
    before = runner.embed(batch)
    sites = [site for site in find_sites(dense) if site.layer == 0]
    for site in sites:
        # Falcon adds to an output in place.
        hook = lambda _module, _args, output, site=site: written.append((site, output.clone()))  # noqa: E731
        site.projection.register_forward_hook(hook)
    after = runner.run(0, batch, before)

    assert [site.kind for site, _ in written] == ["attention", "mlp"]
    total = sum(joining.joined(site, output).view_as(before) for site, output in written) * joining.multiplier
    assert torch.allclose(before + total, after, rtol=1e-4, atol=1e-4) == adds_up


def test_a_task_without_an_auto_class_is_refused_with_those_that_have_one():
    config = tiny.make_config("gpt2")
    with pytest.raises(ValueError, match=r"GPT2DoubleHeadsModel has no pruned counterpart.*GPT2LMHeadModel"):
        FwdPruner(transformers.GPT2DoubleHeadsModel(config)).prune(
            method="magnitude", reconstruction="none", kinds=["mlp"]
        )


def test_an_attention_implementation_is_switched_where_the_stock_class_can():
    for name, switched in (("falcon_multi_query", False), ("gpt_neox", True)):
        pruned = FwdPruner(tiny.make_model(name)).prune(method="magnitude", reconstruction="none", kinds=["mlp"])
        pruned.set_attn_implementation("eager")

        assert (pruned.config._attn_implementation == "eager") == switched
