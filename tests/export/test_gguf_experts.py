"""Mixtures with fewer experts in GGUF files, run by stock llama.cpp."""

import copy

import gguf
import pytest
import tiny_mixtures
import torch
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


# Three of six KV groups would be 48 features of heads, which blocks of 32 do not divide. Every token uses all experts
# that are kept, so that activations of 8 bits do not change which ones it uses.
FOR_BLOCKS = {"hidden_size": 64, "intermediate_size": 64, "num_experts_per_tok": 4}
GROUPS = {**FOR_BLOCKS, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}
ALL_HEADS = {**FOR_BLOCKS, "num_attention_heads": 8, "num_key_value_heads": 8}
OWN_WIDTHS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, **NO_MLPS}
EXPERTS_AND_HEADS = {**REQUEST, "kinds": ["expert", "attention"], "attention_unit": "kv_group"}
PRUNED_FOR_A_TYPE = [
    ("mixtral", GROUPS, EXPERTS_AND_HEADS),
    ("qwen3_moe", {**GROUPS, "moe_intermediate_size": 32, **NO_MLPS}, EXPERTS_AND_HEADS),
    ("granitemoe", GROUPS, EXPERTS_AND_HEADS),
    ("gpt_oss", {**GROUPS, **PLAIN_ROPE}, EXPERTS_AND_HEADS),
    ("mixtral", GROUPS, {**EXPERTS_AND_HEADS, "kinds": ["attention"]}),
    ("qwen2_moe", {**ALL_HEADS, **OWN_WIDTHS}, EXPERTS),
    ("olmoe", ALL_HEADS, EXPERTS),
]


@torch.no_grad()
def rounded(model):
    """The model with weights of 4 bits, and of 8 bits in the matrix that computes the logits."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("_bias", "gate.weight", "router.weight", "layer.weight")):
            continue
        kind = gguf.GGMLQuantizationType["Q8_0" if name.startswith("lm_head") else "Q4_0"]
        transposed = getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
        rows = (parameter.transpose(1, 2) if transposed else parameter).contiguous().numpy()
        rows = torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind).reshape(rows.shape).copy())
        parameter.copy_(rows.transpose(1, 2) if transposed else rows)
    return model


@pytest.mark.parametrize(("name", "changes", "request_"), PRUNED_FOR_A_TYPE)
def test_mixtures_pruned_for_a_type_have_it_in_all_matrices_but_routers(
    name, changes, request_, tokens, tokenizer, tmp_path
):
    model = pruned(name, changes, tokens, **request_, for_gguf="q4_0")
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="q4_0")

    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.startswith("blk") and tensor.name.endswith(".weight") and len(tensor.shape) > 1:
            router = "ffn_gate_inp" in tensor.name
            assert tensor.tensor_type.name == ("F32" if router else "Q4_0"), tensor.name
    features = {layer.self_attn.k_proj.out_features for layer in model.model.layers}
    assert len(features) == 1
    assert (features.pop() < 8 * changes["num_key_value_heads"]) == ("attention" in request_["kinds"])
    assert find_sites(model)[-1].num_units == (4 if "expert" in request_["kinds"] else 8)
    check_llama_cpp_agrees(rounded(model), file, tokens, 0.1)


def test_a_mixture_without_all_heads_is_refused_where_they_are_needed(tokens, tokenizer, tmp_path):
    request = {**REQUEST, "kinds": ["attention"], "layout": "alike", "attention_unit": "kv_group"}
    model = pruned("qwen2_moe", NO_MLPS, tokens, **request)
    with pytest.raises(
        ValueError, match=r"needs all 4 heads, and this model has 2\. Prune its experts alone: .*\['expert'\]"
    ):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


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
