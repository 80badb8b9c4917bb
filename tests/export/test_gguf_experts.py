"""Mixtures with fewer experts in GGUF files, run by stock llama.cpp."""

import gguf
import pytest
import tiny_mixtures
from llama_cpp import check_llama_cpp_agrees

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.export import export_gguf


REQUEST = {"method": "magnitude", "reconstruction": "none", "sparsity": 0.5}
EXPERTS = {"kinds": ["expert"], **REQUEST}
LAYERS = {"kinds": ["expert", "layer"], "depth_sparsity": 0.34, **REQUEST}
HEADS = {**LAYERS, "kinds": ["expert", "layer", "attention"], "attention_unit": "kv_group"}
# Changes that make tiny mixtures ones that llama.cpp holds.
NO_MLPS, ALL_KV_HEADS = {"mlp_only_layers": []}, {"num_key_value_heads": 4}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32}
HELD = [
    ("mixtral", {}, EXPERTS, "llama"),
    ("mixtral", {}, HEADS, "llama"),
    ("qwen3_moe", NO_MLPS, HEADS, "qwen3moe"),
    ("qwen2_moe", NO_MLPS, LAYERS, "qwen2moe"),
    ("olmoe", ALL_KV_HEADS, LAYERS, "olmoe"),
    ("granitemoe", {}, HEADS, "granitemoe"),
    ("gpt_oss", PLAIN_ROPE, HEADS, "gpt-oss"),
    ("gpt_oss", {"rope_parameters": {**YARN, "truncate": True}}, EXPERTS, "gpt-oss"),
]


def pruned(name, changes, tokens, **request):
    return FwdPruner(tiny_mixtures.make_mixture(name, **changes)).prune(None, tokens, **request).eval()


@pytest.mark.parametrize(("name", "changes", "request_", "architecture"), HELD)
def test_llama_cpp_runs_mixtures_with_fewer_experts(
    name, changes, request_, architecture, tokens, tokenizer, tmp_path
):
    model = pruned(name, changes, tokens, **request_)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")

    reader = gguf.GGUFReader(file)
    assert reader.fields["general.architecture"].contents() == architecture
    experts = find_sites(model)[-1].num_units
    assert reader.fields[f"{architecture}.expert_count"].contents() == experts < 8
    check_llama_cpp_agrees(model, file, tokens, 2e-4)


def test_routers_stay_in_float32_and_experts_are_quantized(tokens, tokenizer, tmp_path):
    model = pruned("mixtral", {"intermediate_size": 64}, tokens, **EXPERTS)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="q8_0")

    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {kinds[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q8_0"}
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    check_llama_cpp_agrees(model, file, tokens, 0.3)


REFUSED = [
    ("qwen3_moe", {}, "has experts in every layer, and layer 0 of this model has one MLP in their place"),
    ("qwen3_moe", {**NO_MLPS, "norm_topk_prob": False}, "computes with norm_topk_prob=True, and this model has"),
    ("olmoe", {}, "norms of all query heads and of as many key heads"),
    ("deepseek_v3", {}, "no GGUF export for deepseek_v3; .* does not write the routers of this family"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_mixtures_that_llama_cpp_would_compute_otherwise_are_refused(name, changes, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_gguf(tiny_mixtures.make_mixture(name, **changes), tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_rounding_of_llama_cpp_is_warned_of(tokenizer, tmp_path, caplog):
    model = tiny_mixtures.make_mixture("gpt_oss", rope_parameters={**YARN, "truncate": False})
    export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")

    assert "truncate=False, and llama.cpp rounds" in caplog.text
