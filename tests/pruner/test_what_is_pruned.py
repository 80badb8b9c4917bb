"""Models that were changed since they were loaded: pruned as they are, or refused while they are whole."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from optimum_fwdprune import FwdPruner


DATA_FREE = tiny.request(method="magnitude", reconstruction="none", sparsity=0.3)


def refused(model, message):
    """Whether pruning is refused with `message`, and the model is what it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        FwdPruner(model).prune(DATA_FREE)
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("target", ["q_proj", "o_proj", "gate_proj", "down_proj", "lm_head", "embed_tokens"])
def test_models_with_adapters_are_refused(target):
    model = tiny.make_model("llama_gqa_biases")
    model.add_adapter(LoraConfig(r=2, target_modules=[target]))

    assert refused(model, rf"{target} has an adapter.*merge_and_unload")


def test_a_base_model_with_adapters_or_trained_copies_of_peft_is_refused():
    model = tiny.make_model("llama_gqa_biases")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert refused(model, "q_proj has an adapter.*merge_and_unload")

    # One matrix, such as the key and value rows that query heads share, is enough.
    model = tiny.make_model("llama_gqa_biases")
    get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]))
    assert refused(model, "(k_proj|lm_head) has an adapter.*merge_and_unload")


def test_merged_adapters_are_no_obstacle():
    adapted = get_peft_model(tiny.make_model("llama_gqa_biases"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    pruner = FwdPruner(adapted.merge_and_unload())
    pruner.prune(DATA_FREE)

    assert pruner.report.masked_difference < 1e-4


@pytest.mark.parametrize("name", ["mlp.gate_proj", "self_attn.k_proj"])
def test_every_linear_of_a_site_must_be_one_that_can_be_cut(name):
    model = tiny.make_model("llama_gqa_biases")
    linear = model.model.layers[1].get_submodule(name)
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)

    assert refused(model, rf"layers\.1\.{name} is a Linear with torch.int8 weights.*unquantized")


def test_parameters_that_the_family_lacks_are_refused():
    model = tiny.make_model("llama_gqa_biases")
    model.model.norm.register_parameter("bias", nn.Parameter(torch.zeros(48)))

    assert refused(model, r"1 parameters that PrunedLlamaForCausalLM lacks, such as model\.norm\.bias")


@pytest.mark.parametrize(
    ("name", "claimed", "found"), [("llama_gqa_biases", True, "two tensors"), ("llama_mha_tied", False, "one tensor")]
)
def test_a_config_that_contradicts_the_tie_is_refused(name, claimed, found):
    model = tiny.make_model(name)
    model.config.tie_word_embeddings = claimed
    assert refused(model, f"tie_word_embeddings={claimed}.*{found}")

    model.config.tie_word_embeddings = not claimed
    FwdPruner(model).prune(DATA_FREE)


# Other families of transformers do not run at all with return_dict=False.
OUTPUTS = [
    ("bloom", "return_dict", False),
    *((name, f"output_{what}", True) for name in ("bloom", "qwen2") for what in ("attentions", "hidden_states")),
]


@pytest.mark.parametrize(("name", "option", "value"), OUTPUTS)
@pytest.mark.parametrize("asked", [{"reconstruction": "least_squares"}, {"method": "taylor"}], ids=str)
def test_what_a_config_returns_by_default_changes_nothing(name, option, value, asked, tokens):
    model, plain = (tiny.make_model(name, attn_implementation="eager") for _ in range(2))
    setattr(model.config, option, value)
    pruner, expected = FwdPruner(model), FwdPruner(plain)
    for each in (pruner, expected):
        each.prune(tiny.request(sparsity=0.3, **asked), tokens)

    assert pruner.plan.kept == expected.plan.kept
    assert getattr(pruner.model.config, option) is value


@pytest.mark.parametrize("trainable", [False, True])
def test_frozen_models_stay_frozen_where_reconstruction_adds_biases(trainable, tokens):
    model = tiny.make_model("llama_mqa").requires_grad_(trainable)
    pruned = FwdPruner(model).prune(tiny.request(sparsity=0.3, reconstruction="bias"), tokens)

    assert pruned.model.layers[0].mlp.down_proj.bias is not None
    assert {parameter.requires_grad for parameter in pruned.parameters()} == {trainable}


def test_a_dense_model_that_is_not_consumed_keeps_its_generation_config():
    model = tiny.make_model("llama_gqa_biases")
    pruned = FwdPruner(model).prune(DATA_FREE, inplace=False)
    pruned.generation_config.max_new_tokens = 7

    assert model.generation_config.max_new_tokens is None


def share_a_layer(layers):
    layers[1] = layers[0]


def share_a_norm(layers):
    layers[1].input_layernorm = layers[0].input_layernorm


def share_an_mlp(layers):
    layers[1].mlp = layers[0].mlp


def drop_an_mlp(layers):
    layers[1].mlp = torch.nn.Identity()


def drop_a_projection(layers):
    layers[1].self_attn.o_proj = torch.nn.Identity()


def drop_a_layer(layers):
    layers[1] = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((share, "are one tensor in this LlamaForCausalLM") for share in (share_a_layer, share_a_norm, share_an_mlp)),
        *((drop, "layers.1 .* is not built like") for drop in (drop_an_mlp, drop_a_projection, drop_a_layer)),
    ],
)
def test_layers_that_share_or_lack_modules_are_refused_while_whole(change, message, monkeypatch):
    monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", lambda *_: pytest.fail("it was scored"))
    model = tiny.make_model("llama_mha_tied")
    change(model.model.layers)
    with pytest.raises(ValueError, match=message):
        FwdPruner(model).prune(method="magnitude", reconstruction="none")
