"""`inspect` of models that were not pruned: their units, or the declaration of a family that is not supported."""

import importlib.util
import json
import sys

import made_up_family
import pytest
import tiny
import tiny_multimodal
import torch
import transformers

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.architectures import registry
from optimum_fwdprune.models.layout import NORM_OVER_HEADS


SIZES = {"vocab_size": tiny.VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
# Projections inside a nested module, and a width that the config lacks; grouped heads; an attention that reshapes by a
# size of its own, and an MLP that is part of the layer.
UNSUPPORTED = {
    "gpt_neo": (
        transformers.GPTNeoConfig,
        {"num_heads": 6, "attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    ),
    "vaultgemma": (transformers.VaultGemmaConfig, {**HEADS, "intermediate_size": 64}),
    "xglm": (transformers.XGLMConfig, {"attention_heads": 6, "ffn_dim": 64}),
}
# Norms of the outputs, scaled outputs, and query and key norms: with weights for every head, and over all heads.
made_up_family.register()
UNSUPPORTED |= {
    f"made_up_{name}": (made_up_family.MadeUpConfig, {**HEADS, "intermediate_size": 64, **values})
    for name, values in {
        "norms_after": {"norms_after": True},
        "residual_scale": {"residual_scale": 0.3},
        "head_norms": {"use_qk_norm": True},
        "norms_over_heads": {"norms_over_heads": True},
    }.items()
}
DECLARED = {
    "made_up_norms_after": (
        'norms=("norm_1", "norm_2"),\n',
        'norms=("norm_3", "norm_4"),\n',
        "    output_norm=True,\n",
    ),
    "made_up_residual_scale": (
        'norms=("norm_1",),\n',
        'norms=("norm_3",),\n',
        "    residual_multiplier=lambda config: config.residual_scale,\n",
    ),
    "made_up_norms_over_heads": (f'fixed="{NORM_OVER_HEADS}",\n',),
    "made_up_head_norms": ('query_norms="q_norm",\n', 'key_norms="k_norm",\n'),
}


def unsupported(name, folder):
    """Save the config of a tiny model whose family is not supported, and return the model."""
    config_class, values = UNSUPPORTED[name]
    config = config_class(
        **{config_class.attribute_map.get(key, key): value for key, value in SIZES.items()}, **values
    )
    config.eos_token_id = 2
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # Equal weights would hide a norm that is cut wrongly.
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_printed_declaration_prunes_the_family(name, cli, tokens, tmp_path, monkeypatch):
    dense = unsupported(name, tmp_path / "dense")
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    with pytest.raises(
        ValueError, match=rf"'{dense.config.model_type}' is not supported.*optimum-cli fwdprune inspect MODEL"
    ):
        FwdPruner(dense)
    code, printed, _ = cli("inspect", tmp_path / "dense")
    assert code == 0 and "This layout is recognised" in printed
    assert all(line in printed for line in DECLARED.get(name, ()))

    file = tmp_path / f"family_{name}.py"
    file.write_text(printed[printed.index('"""') :])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    pruner = FwdPruner(dense)
    kinds = ["mlp"] if name == "made_up_norms_over_heads" else ["attention", "mlp"]
    request = tiny.request("random", sparsity=0.4, reconstruction="none", kinds=kinds)
    pruned = pruner.prune(request, tokens, inplace=False)
    expected = tiny.masked_by_hand(dense, pruner.plan)(tokens[:4]).logits

    assert all(pruner.plan.removed((1, kind)) for kind in kinds)
    assert (pruned(tokens[:4]).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (dense(tokens[:4]).logits - expected).abs().max() > 1e-2 * expected.abs().max()
    pruner.save_pretrained(tmp_path / "pruned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(again(tokens[:4]).logits, pruned(tokens[:4]).logits)


def test_a_declaration_is_written_into_a_file_that_is_not_there_yet(cli, tmp_path):
    unsupported("xglm", tmp_path / "dense")
    file = tmp_path / "family.py"
    code, printed, _ = cli("inspect", tmp_path / "dense", "--declaration", file)
    assert code == 0 and "register_architecture" not in printed
    assert 'model_type = "pruned_xglm"' in file.read_text()

    code, _, error = cli("inspect", tmp_path / "dense", "--declaration", file)
    assert code == 1 and "family.py: file exists" in error


def test_a_supported_model_shows_its_units_and_linears(cli, tmp_path):
    tiny.make_config("llama_gqa_biases").save_pretrained(tmp_path)
    code, shown, _ = cli("inspect", tmp_path)
    rows = {line.split("  ")[1].strip(): line.split() for line in shown.splitlines() if line.startswith("  ")}

    assert code == 0
    # Three KV groups: two query heads, a key head and a value head of 8 features each, with biases.
    group = 2 * (48 * 8 + 8) + 2 * (48 * 8 + 8) + 2 * 48 * 8
    assert rows["KV groups"][2:6] == ["3", "3", f"{group:,}", f"{9 * group:,}"]
    assert rows["MLP channels"][2:6] == ["3", "64", str(3 * 48 + 2), f"{192 * (3 * 48 + 2):,}"]
    # Two query heads of 8 features are wide as a key and a value head; there are three such groups in three layers.
    layer = 3 * group + 48 + 64 * (3 * 48 + 2) + 48
    assert rows["whole layers"][2:6] == ["3", "1", f"{layer:,}", f"{3 * layer:,}"]
    assert rows["whole attentions"][2:4] == rows["whole MLPs"][2:4] == ["3", "1"]
    assert rows["mlp.down_proj"] == ["mlp.down_proj", "0-2", "64", "->", "48", "1", "of", "64", "inputs"]


@pytest.mark.parametrize(
    ("name", "missing", "sentence"),
    [
        ("olmo2", ["KV groups", "query heads"], f"No single head can be removed: {NORM_OVER_HEADS}"),
        (
            "opt_post_norm_projected",
            ["whole layers"],
            "No whole layer can be removed: the layers normalize the",
        ),
    ],
)
def test_units_that_cannot_be_removed_are_left_out_with_the_reason(name, missing, sentence, cli, tmp_path):
    tiny.make_config(name).save_pretrained(tmp_path)
    code, shown, _ = cli("inspect", tmp_path)

    assert code == 0 and sentence in shown and "whole attentions" in shown
    assert not any(unit in shown.replace(sentence, "") for unit in missing)


def test_a_multimodal_model_shows_the_units_of_its_language_model(cli, tmp_path):
    tiny_multimodal.CONFIGS["qwen3_vl"]().save_pretrained(tmp_path)
    code, shown, _ = cli("inspect", tmp_path)
    rows = {line.split("  ")[1].strip(): line.split() for line in shown.splitlines() if line.startswith("  ")}

    assert code == 0 and "Qwen3VLForConditionalGeneration (qwen3_vl)" in shown
    assert rows["MLP channels"][2:4] == ["4", "64"] and rows["whole layers"][2] == "2"
    assert "The layers 0-1 cannot be removed whole." in shown


def test_a_pruned_checkpoint_shows_what_was_kept_and_what_is_left(cli, tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_mqa"))
    pruner.prune(tiny.request("random", kinds=["mlp"], sparsity=0.5, reconstruction="none"), tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    kept = len(pruner.plan.kept[(0, "mlp")])
    # As remote code it is loaded by files that lie beside the weights, here without the plan.
    pruner.model.save_pretrained(tmp_path / "remote")
    for file in (tmp_path / "remote").glob("fwdprune_*"):
        file.unlink()

    code, shown, _ = cli("inspect", tmp_path / "pruned")
    assert code == 0 and f"{kept} / 64" in shown
    remote = [cli("inspect", tmp_path / "remote", *more)[1] for more in ([], ["--trust_remote_code"])]
    for output in (shown, *remote):
        rows = {line.split("  ")[1].strip(): line.split() for line in output.splitlines() if line.startswith("  ")}
        parameters = sum(parameter.numel() for parameter in pruner.model.parameters())
        assert f"PrunedLlamaForCausalLM (pruned_llama), {parameters:,} parameters" in output
        assert rows["MLP channels"][2:5] == ["3", str(kept), "144"]


def test_multimodal_models_that_cannot_be_pruned_are_described_without_a_declaration(cli, tmp_path):
    vision = {"embed_dim": 32, "hidden_size": 48, "depth": 1, "num_heads": 2, "patch_size": 4}
    unknown = transformers.Qwen2VLConfig(text_config=tiny_multimodal._QWEN_TEXT, vision_config=vision)
    unknown.save_pretrained(tmp_path / "unknown")
    code, shown, _ = cli("inspect", tmp_path / "unknown")
    assert code == 0 and "mlp.down_proj" in shown and "declaration of a multimodal family is written by hand" in shown

    known = tiny_multimodal.CONFIGS["llava_llama"]()
    known.text_config = tiny.make_config("qwen2")
    known.save_pretrained(tmp_path / "known")
    code, _, error = cli("inspect", tmp_path / "known")
    assert code == 1 and "type 'qwen2', which cannot be pruned inside it. Supported are llama, mistral" in error


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.Dots1Config(**HEADS, **SIZES, n_routed_experts=2, n_shared_experts=1), "experts"),
        (transformers.MambaConfig(**SIZES), "mixer.A_log of a decoder layer"),
    ],
    ids=["experts", "state_space"],
)
def test_what_a_layout_cannot_describe_is_named(config, reason, cli, tmp_path):
    config.save_pretrained(tmp_path)
    code, _, error = cli("inspect", tmp_path)

    assert code == 1 and reason in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "48"}, "describes no model: Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "describes no model: The hidden size (48) is not a multiple of"),
        ({"hidden_act": "nope"}, "describes no model: KeyError: 'nope'"),
        ({"vocab_size": -5}, "describes no model: Trying to create tensor with negative dimension -5"),
        ({"num_key_value_heads": 4}, "has 6 query heads and 4 KV heads"),
        ({"intermediate_size": 0}, "mlp.down_proj has no channels. Correct intermediate_size"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_values_of_a_config_that_no_model_can_have_are_named(values, message, cli, tmp_path):
    config = tiny.make_config("llama_mqa").to_dict() | {"num_key_value_heads": 3, **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, error = cli("inspect", tmp_path)

    assert code == 1 and error.startswith("error: ") and message in error
