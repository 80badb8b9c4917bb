"""Requests for a GGUF file: the plan keeps to what llama.cpp requires, and the request says what that costs."""

import gguf
import pytest
import tiny
import tiny_mixtures
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.export import export_gguf
from optimum_fwdprune.planning.run import Run
from optimum_fwdprune.request.gguf import GGUF_TYPES


# 8 query heads of 8 features in two groups, so that 32 features of o_proj are 4 heads.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "mlp_bias": False,
}


@pytest.fixture
def announced(monkeypatch):
    """What runs announce."""
    lines = []
    monkeypatch.setattr("optimum_fwdprune.planning.settler.announce", lines.append)
    return lines


def pruned(name, fields, **changes):
    pruner = FwdPruner(tiny.make_model(name, **{**SHAPE, **changes}))
    share = {} if "target_parameters" in fields else {"sparsity": 0.3}
    pruner.prune(tiny.request("magnitude", **{**share, "kinds": ["mlp"], **fields}))
    return pruner


@pytest.mark.parametrize(
    ("name", "fields", "widths"),
    [
        ("llama_gqa_biases", {"scope": "global", "budget": "joint", "kinds": ["attention", "mlp"]}, None),
        ("llama_gqa_biases", {"kinds": ["attention", "mlp"], "attention_unit": "kv_group", "sparsity": 0.4}, None),
        ("llama_gqa_biases", {"multiple_of": 48}, {96}),
        ("llama_gqa_biases", {"tensor_parallel": 2, "rounds": 2, "sparsity": 0.55}, {32, 64}),
        # llama.cpp's architecture of these families has layers of one size.
        ("qwen2", {}, {96}),
        ("qwen2", {"target_parameters": 100_000}, {32}),
        ("qwen3", {"kinds": ["attention", "mlp"], "sparsity": 0.5, "budget": "joint"}, None),
    ],
    ids=str,
)
def test_every_matrix_of_the_file_has_the_type_that_was_asked_for(name, fields, widths, tokenizer, tmp_path):
    pruner = pruned(name, {"for_gguf": "q4_0", **fields})
    file = export_gguf(pruner.model, tokenizer, tmp_path / "model.gguf", dtype="q4_0")
    matrices = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]

    assert pruner.report.removed_parameters > 0
    assert {tensor.tensor_type.name for tensor in matrices if tensor.name.startswith("blk")} == {"Q4_0"}
    if widths is not None:
        assert {layer.mlp.up_proj.out_features for layer in pruner.model.model.layers} == widths


def test_the_request_says_what_it_costs(announced):
    pruned("qwen2", {"for_gguf": "q4_k_m"}, intermediate_size=768, hidden_size=96, num_attention_heads=12)
    cost, rows = announced[1:]

    assert cost == (
        "for_gguf='q4_k_m': all layers are alike (llama.cpp's qwen2 has layers of one size), all heads are kept, MLP "
        "widths are multiples of 256; it removes 30.8% of the prunable parameters, compared with 30.0% without it."
    )
    assert rows == (
        "Rows of 96 (hidden size) and 96 (heads) values are no multiples of 256, the block of q4_k_m: llama-quantize "
        "writes these matrices in q5_0 and q8_0 instead."
    )


@pytest.mark.parametrize(
    ("name", "changes", "fields", "message"),
    [
        ("opt_pre_norm", {}, {}, "There is no GGUF export for opt"),
        ("qwen2", {}, {"kinds": ["attention"]}, r"all heads together to be as wide.*Use kinds=\['mlp'\]"),
        ("qwen2", {}, {"scope": "global"}, r"scope='global' makes them differ\. Set scope='layer' and"),
        ("qwen2", {}, {"skip_layers": [0]}, r"skip_layers=\[0\] makes them differ"),
        ("qwen2", {}, {"kinds": ["sublayer"]}, r"every layer of llama\.cpp's qwen2 has attention and MLP"),
        ("qwen2", {}, {"method": "wanda_sp", "reconstruction": "bias"}, "no biases in the projections"),
        ("granite", {"rope_parameters": tiny.CONFIGS["llama3_head_dim"][1]["rope_parameters"]}, {}, "type 'llama3'"),
        ("smollm3", {}, {}, "no rotary embeddings in every 4th layer"),
        # No smaller number of channels is a multiple of the block.
        ("llama_gqa_biases", {"intermediate_size": 32}, {}, r"than layer 0 can lose with for_gguf='q4_0'"),
        ("llama_gqa_biases", {}, {"for_gguf": "q4_k"}, "for_gguf must be one of f32, .* Did you mean q4_k_"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused_before_the_work(name, changes, fields, message, monkeypatch):
    monkeypatch.setattr("optimum_fwdprune.planning.run.Run._round", lambda *_: pytest.fail("it was pruned"))
    pruner = FwdPruner(tiny.make_model(name, **changes))
    with pytest.raises(ValueError, match=message):
        request = {"sparsity": 0.3, "kinds": ["mlp"], "for_gguf": "q4_0", "method": "magnitude", **fields}
        pruner.prune(tiny.request(**request), torch.ones(8, 16, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "changes", "fields", "message"),
    [
        ("deepseek_v3", {}, {}, "no GGUF export for deepseek_v3; .* does not write the routers of this family"),
        ("qwen3_moe", {}, {}, "needs experts in every layer, and layer 0 of this model has one MLP in their place"),
        ("qwen2_moe", {"mlp_only_layers": []}, {"kinds": ["attention", "expert"]}, r"Use kinds=\['expert'\]"),
        ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": True}, {}, "qwen2moe computes with norm_topk_prob=F"),
        ("mixtral", {}, {"kinds": ["expert", "attention"], "scope": "global"}, "scope='global' makes them differ"),
        ("mixtral", {}, {"kinds": ["sublayer"]}, r"every layer of llama\.cpp's llama has attention and MLP"),
        ("mixtral", {}, {"kinds": ["attention"], "method": "flap", "reconstruction": "bias"}, "llama has no biases"),
    ],
)
def test_mixtures_that_llama_cpp_cannot_hold_are_refused_before_the_work(name, changes, fields, message, monkeypatch):
    monkeypatch.setattr("optimum_fwdprune.planning.run.Run._round", lambda *_: pytest.fail("it was pruned"))
    pruner = FwdPruner(tiny_mixtures.make_mixture(name, **changes))
    request = {"method": "magnitude", "sparsity": 0.5, "kinds": ["expert"], "for_gguf": "q4_0", **fields}
    with pytest.raises(ValueError, match=message):
        pruner.prune(tiny.request(**request), torch.ones(8, 16, dtype=torch.int64))


def test_the_rows_of_experts_that_blocks_do_not_divide_are_announced(announced):
    pruner = FwdPruner(tiny_mixtures.make_mixture("mixtral"))
    pruner.prune(tiny.request("magnitude", sparsity=0.5, kinds=["expert"], for_gguf="q4_0"))

    assert announced[1:] == [
        "for_gguf='q4_0': nothing changes; it removes 50.0% of the prunable parameters, as without it.",
        "Rows of 24 (each expert) values are no multiples of 32, the block of q4_0: the export writes these matrices "
        "in f16 instead.",
    ]


@pytest.mark.parametrize(
    ("kinds", "fields", "message"),
    [
        (
            ["attention"],
            {"layout": "alike", "attention_unit": "kv_group"},
            "needs all 4 heads of this model, .* has 2",
        ),
        (["sublayer"], {"method": "random"}, "those of this model differ: it was pruned before"),
    ],
)
def test_what_a_mixture_lost_before_is_refused_before_the_work(kinds, fields, message, monkeypatch):
    pruner = FwdPruner(tiny_mixtures.make_mixture("qwen2_moe", mlp_only_layers=[]))
    pruner.prune(tiny.request(**{"method": "magnitude", "sparsity": 0.5, "kinds": kinds, **fields}))
    monkeypatch.setattr("optimum_fwdprune.planning.run.Run._round", lambda *_: pytest.fail("it was pruned"))
    with pytest.raises(ValueError, match=message):
        pruner.prune(tiny.request("magnitude", sparsity=0.5, kinds=["expert"], for_gguf="q8_0"))


def test_layers_that_differ_already_are_refused():
    pruner = pruned("qwen2", {"scope": "global"})
    with pytest.raises(ValueError, match="those of this model differ: it was pruned before"):
        pruner.prune(tiny.request("magnitude", sparsity=0.2, kinds=["mlp"], for_gguf="f16"))


def test_a_plan_after_which_llama_cpp_would_compute_something_else_is_refused():
    changes = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "layer_types": None, "sliding_window": None}
    pruner = FwdPruner(tiny.make_model("smollm3", **changes, use_sliding_window=False))
    with pytest.raises(ValueError, match="layer 2 of this model differs"):
        pruner.prune(tiny.request("magnitude", sparsity=0.25, kinds=["layer"], for_gguf="f16"))
    assert pruner.model.config.num_hidden_layers == 4


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("for_gguf", ["q4_0", None])
def test_a_tokenizer_that_the_file_cannot_hold_is_warned_of_before_the_work(for_gguf, dry_run, monkeypatch):
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", **SHAPE), PreTrainedTokenizerFast(tokenizer_object=unigram))
    work, events = getattr(Run, "dry_run" if dry_run else "prune"), []
    monkeypatch.setattr(Run, work.__name__, lambda *args: events.append("the work") or work(*args))
    monkeypatch.setattr("optimum_fwdprune.pruning.logger.warning", lambda text, *args: events.append(text % args))
    getattr(pruner, work.__name__)(tiny.request("magnitude", sparsity=0.3, kinds=["mlp"], for_gguf=for_gguf))

    assert events.pop() == "the work"
    assert ["is no BPE (Unigram)" in event for event in events] == [True] * (for_gguf is not None)


def test_types_have_the_blocks_of_the_package_gguf():
    for name, kind in GGUF_TYPES.items():
        of_matrices = gguf.GGMLQuantizationType[name.upper().removesuffix("_M").removesuffix("_S").removesuffix("_L")]
        assert gguf.GGML_QUANT_SIZES[of_matrices][0] == kind.block
        assert hasattr(gguf.LlamaFileType, kind.file_type)
