"""Pruned classes behave like the stock classes they stand for."""

import dataclasses
import json

import pytest
import tiny
import torch
import transformers
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.forward.gates import gated


HETEROGENEOUS = tiny.request(sparsity=0.4, scope="global", attention_unit="kv_group", reconstruction="none")
WITH_ROPE = ("mistral_sliding_window", "qwen2", "qwen3", "phi3")
FAMILIES = ("llama_gqa_biases", "mistral_sliding_window", "opt_pre_norm", "bloom", "qwen2", "qwen3")
TASKS = (
    "AutoModel",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
# Stock OPT has no token classification.
HEADS = [(name, task) for name in FAMILIES for task in TASKS if (name, task) != ("opt_pre_norm", TASKS[2])]


@pytest.mark.parametrize(("name", "task"), HEADS)
@torch.no_grad()
def test_every_task_head_is_pruned_saved_and_reloaded(name, task, tokens, tmp_path):
    auto_class = getattr(transformers, task)
    dense = tiny.make_model(name, auto_class, pad_token_id=0)
    pruned = FwdPruner(dense).prune(HETEROGENEOUS, tokens)
    pruned.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)

    assert type(loaded) is type(pruned)
    assert type(pruned).__name__ == f"Pruned{type(dense).__name__}"
    for expected, actual in zip(pruned(tokens).to_tuple(), loaded(tokens).to_tuple()):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(expected, actual)


def test_classifiers_that_cannot_tell_padding_are_pruned(tokens):
    """They take one row at a time."""
    dense = tiny.make_model("llama_gqa_biases", transformers.AutoModelForSequenceClassification, pad_token_id=None)
    pruner = FwdPruner(dense)
    pruner.prune(tiny.request(sparsity=0.3), tokens)
    assert pruner.report.masked_difference < 1e-4


def test_models_of_few_positions_are_pruned_without_text():
    pruner = FwdPruner(tiny.make_model("opt_pre_norm", max_position_embeddings=16))
    pruner.prune(tiny.request(method="magnitude", reconstruction="none", sparsity=0.3))
    assert pruner.report.masked_difference < 1e-4


@torch.no_grad()
def test_pruning_a_pruned_model_composes(dense, tokens):
    """Two prunings compute what the dense model computes under both plans' masks."""
    # As much, twice, as multi-query attention can give: its one KV group stays.
    config = dataclasses.replace(HETEROGENEOUS, sparsity=0.3)
    first = FwdPruner(dense)
    second = FwdPruner(first.prune(config, tokens, inplace=False))
    twice = second.prune(config, tokens, inplace=False)
    masks = tiny.masks_of(first.plan)
    for key, kept in second.plan.kept.items():
        survivors = torch.tensor(first.plan.kept[key])[kept]
        masks[key] = torch.isin(torch.arange(first.plan.num_units[key]), survivors).float()
    with gated(find_sites(dense, "kv_group"), masks):
        expected = dense(tokens).logits

    assert second.report.sparsity > 0.25
    assert (twice(tokens).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_pruning_again_reaches_the_disk_and_back(dense, tokens, tmp_path):
    pruner = FwdPruner(FwdPruner(dense).prune(HETEROGENEOUS, tokens))
    pruned = pruner.prune(tiny.request(method="flap", sparsity=0.3), tokens)
    pruner.save_pretrained(tmp_path / "twice")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice")

    assert torch.equal(loaded(tokens).logits, pruned(tokens).logits)


@torch.no_grad()
def test_a_second_pruning_keeps_the_biases_of_the_first(dense, tokens, tmp_path):
    once = FwdPruner(dense).prune(tiny.request(method="flap", sparsity=0.3), tokens)
    twice = FwdPruner(once).prune(tiny.request(sparsity=0.0, reconstruction="none"), tokens, inplace=False)
    twice.save_pretrained(tmp_path)

    assert torch.equal(twice(tokens).logits, once(tokens).logits)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, once(tokens).logits)


def test_bloom_heads_keep_the_alibi_slopes_of_the_dense_model(tokens):
    """Also after two prunings: slopes recomputed for fewer heads would be others."""
    pruner = FwdPruner(tiny.make_model("bloom"))
    pruner.prune(HETEROGENEOUS, tokens)
    first = pruner.plan
    pruned = pruner.prune(HETEROGENEOUS, tokens)
    layer = 0
    # The plan of both prunings, in terms of the dense model.
    ids = pruner.plan.kept[(layer, "attention")]

    assert set(ids) <= set(first.kept[(layer, "attention")])
    assert pruned.transformer.h[layer].self_attention.kept_heads == ids
    assert len(ids) < 6
    slopes = build_alibi_tensor(torch.ones(1, 8), 6, torch.float32)
    assert not torch.allclose(slopes[ids], build_alibi_tensor(torch.ones(1, 8), len(ids), torch.float32))


def test_the_config_names_the_width_of_a_head(dense, tokens, tmp_path):
    """What sizes caches ahead of time must not divide the hidden size by heads that are gone."""
    site = find_sites(dense, "query_head")[0]
    head_dim = site.unit_width
    FwdPruner(dense).prune(HETEROGENEOUS, tokens).save_pretrained(tmp_path)

    assert transformers.AutoConfig.from_pretrained(tmp_path).head_dim == head_dim


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_config_has_a_number_where_every_layer_has_the_same_one(scope, dense, tokens):
    pruner = FwdPruner(dense)
    config = pruner.prune(dataclasses.replace(HETEROGENEOUS, scope=scope, skip_layers=[]), tokens).config
    sizes = json.loads(config.to_json_string())["per_layer_config"]

    for name in {name for layer in sizes.values() for name in layer}:
        values = [getattr(layer, name) for layer in config.per_layer_config]
        if values.count(values[0]) == len(values):
            assert getattr(config, name) == values[0]
        else:
            with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
                getattr(config, name)
    # Whatever the names that the family has for them.
    if scope == "layer":
        assert config.num_attention_heads == config.per_layer_config[0].num_attention_heads
    # The stock skeleton is built at the dense sizes.
    assert config.to_dict()[config.attribute_map.get("num_attention_heads", "num_attention_heads")] == 6


ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16},
    "yarn": {"original_max_position_embeddings": 16},
    "dynamic": {},
    "linear": {},
}


@pytest.mark.parametrize(
    ("name", "rope"), [*(("llama_gqa_biases", rope) for rope in ROPES), *((name, "longrope") for name in WITH_ROPE)]
)
@torch.no_grad()
def test_rotary_embeddings_that_read_the_config_allow_layers_with_different_heads(name, rope, tokens, tmp_path):
    head_dim = 8 if name != "qwen3" else 16
    factors = {key: [value[0]] * (head_dim // 2) for key, value in ROPES[rope].items() if isinstance(value, list)}
    # Phi-3 has no factor, which its positions tell.
    factor = {} if name == "phi3" else {"factor": 8.0}
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **factor, **ROPES[rope], **factors}
    dense = tiny.make_model(name, rope_parameters=parameters)
    # Scores that differ from layer to layer, so that heads do.
    dense.model.layers[0].self_attn.o_proj.weight.mul_(0.1)
    pruner = FwdPruner(dense)
    pruned = pruner.prune(dataclasses.replace(HETEROGENEOUS, kinds=["attention"], sparsity=0.2), tokens)
    pruned.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert len({layer.num_attention_heads for layer in loaded.config.per_layer_config}) > 1
    assert torch.equal(loaded(tokens).logits, pruned(tokens).logits)
    assert loaded.generate(tokens[:1, :4], max_new_tokens=4).shape == (1, 8)


def test_gradient_checkpointing_changes_no_gradient(architecture_name, tokens):
    pruned = FwdPruner(tiny.make_model(architecture_name)).prune(HETEROGENEOUS, tokens).train()

    def gradients():
        pruned.zero_grad()
        pruned(tokens[:4], labels=tokens[:4]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in pruned.named_parameters()}

    plain = gradients()
    pruned.activation_checkpointing_enable()
    checkpointed = gradients()

    assert all(value.isfinite().all() for value in plain.values())
    assert any(value.abs().max() > 0 for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value)


# One of every kind of layer: what a graph holds does not depend on the sizes.
@pytest.mark.parametrize(
    "architecture_name",
    [*tiny.REPRESENTATIVE, "mistral_sliding_window", "phi3", "falcon_alibi", "gpt2"],
)
@torch.no_grad()
def test_the_forward_compiles_into_one_graph(architecture_name, tokens):
    pruned = FwdPruner(tiny.make_model(architecture_name)).prune(HETEROGENEOUS, tokens)
    torch.compiler.reset()
    compiled = torch.compile(pruned.forward, backend="eager", fullgraph=True)

    torch.testing.assert_close(compiled(tokens[:2]).logits, pruned(tokens[:2]).logits)


@torch.no_grad()
def test_the_attention_implementation_is_switched_in_every_layer(architecture_name, tokens):
    pruned = FwdPruner(tiny.make_model(architecture_name)).prune(HETEROGENEOUS, tokens)
    before = pruned(tokens).logits
    pruned.set_attn_implementation("eager")
    configs = [module.config for module in pruned.decoder_layers.modules() if hasattr(module, "config")]

    assert {config._attn_implementation for config in configs} <= {"eager"}
    torch.testing.assert_close(pruned(tokens).logits, before, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_dense_model_that_is_not_consumed_stays_whole_and_independent(dense, tokens):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    logits = dense(tokens).logits
    pruned = FwdPruner(dense).prune(HETEROGENEOUS, tokens, inplace=False)
    for parameter in pruned.parameters():
        parameter.add_(1.0)
    for buffer in pruned.buffers():
        buffer.add_(1.0)

    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert torch.equal(dense(tokens).logits, logits)


def test_embeddings_are_resized_like_those_of_any_model(tokens, tmp_path):
    pruned = FwdPruner(tiny.make_model("llama_mha_tied")).prune(HETEROGENEOUS, tokens)
    pruned.resize_token_embeddings(tiny.VOCAB + 4)
    pruned.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert loaded(tokens).logits.shape[-1] == tiny.VOCAB + 4
    assert torch.equal(loaded(tokens).logits, pruned(tokens).logits)


def test_a_model_from_a_pruned_config_has_initialised_weights(tokens):
    """Training from scratch in pruned shapes: no weight is left as the allocator gave it."""
    config = FwdPruner(tiny.make_model("llama_gqa_biases")).prune(HETEROGENEOUS, tokens).config
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    weight = model.model.layers[0].mlp.down_proj.weight

    assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.2)
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() == 0
