"""What earlier versions wrote into `config.json` keeps its meaning: sizes by layer, biases, and values left out."""

import json

import pytest
import torch
import transformers

import optimum_fwdprune  # noqa: F401  registers the pruned classes


_LLAMA_SIZES = {
    "vocab_size": 20,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "attention_output_bias": True,
    "mlp_output_bias": True,
    # The second layer kept everything, so that it has no entry.
    "per_layer_config": {"0": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}},
}
# By `model_type`: what is in the file, and for both layers the shapes of the parameters that it decides.
_LLAMA_NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA_SHAPES = {
    0: ((32, 48), (16, 48), (48, 32), (40, 48), (48, 40)),
    1: ((48, 48), (24, 48), (48, 48), (64, 48), (48, 64)),
}
WRITTEN = {
    "pruned_llama": ({**_LLAMA_SIZES, "head_dim": 8}, _LLAMA_NAMES, _LLAMA_SHAPES),
    "pruned_mistral": ({**_LLAMA_SIZES, "head_dim": 8}, _LLAMA_NAMES, _LLAMA_SHAPES),
    "pruned_qwen2": ({**_LLAMA_SIZES, "head_dim": 8}, _LLAMA_NAMES, _LLAMA_SHAPES),
    # A `head_dim` that is the default of the stock config, 128, is not in the file.
    "pruned_qwen3": (
        _LLAMA_SIZES,
        _LLAMA_NAMES[:3],
        {0: ((512, 48), (256, 48), (48, 512)), 1: ((768, 48), (384, 48), (48, 768))},
    ),
    "pruned_opt": (
        {
            "vocab_size": 20,
            "hidden_size": 48,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "head_dim": 8,
            "attention_output_bias": False,
            "mlp_output_bias": False,
            "per_layer_config": {"0": {"num_attention_heads": 4, "ffn_dim": 40}},
        },
        ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
        {
            0: ((32, 48), (32, 48), (48, 32), (40, 48), (48, 40)),
            1: ((48, 48), (48, 48), (48, 48), (64, 48), (48, 64)),
        },
    ),
    "pruned_bloom": (
        {
            "vocab_size": 20,
            "hidden_size": 48,
            "n_head": 6,
            "n_layer": 2,
            "head_dim": 8,
            "intermediate_size": 192,
            "kept_heads": [0, 1, 2, 3, 4, 5],
            "attention_output_bias": False,
            "mlp_output_bias": False,
            "per_layer_config": {"0": {"n_head": 2, "kept_heads": [0, 4], "intermediate_size": 40}},
        },
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        {0: ((48, 48), (48, 16), (40, 48), (48, 40)), 1: ((144, 48), (48, 48), (192, 48), (48, 192))},
    ),
}


@pytest.mark.parametrize("model_type", WRITTEN)
@torch.no_grad()
def test_configs_of_earlier_checkpoints_describe_the_same_model(model_type, tmp_path):
    values, names, shapes = WRITTEN[model_type]
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": model_type}))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path)).eval()

    for number, expected in shapes.items():
        layer = model.decoder_layers[number]
        assert tuple(tuple(layer.get_submodule(name).weight.shape) for name in names) == expected
        # The linears of OPT and BLOOM always have biases.
        outputs = [name for name in names if name.endswith(("o_proj", "out_proj", "down_proj", "fc2", "dense"))]
        assert all(layer.get_submodule(name).bias is not None for name in outputs)
    if model_type == "pruned_bloom":
        assert model.decoder_layers[0].self_attention.kept_heads == [0, 4]
    assert model(torch.arange(8)[None]).logits.isfinite().all()
