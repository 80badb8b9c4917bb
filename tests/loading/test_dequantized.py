"""Mixtures that are stored quantized, as gpt-oss (MXFP4) and DeepSeek-V3 (FP8) are: dequantized, pruned and saved."""

import json

import pytest
import tiny
import tiny_mixtures
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner


# The values of the four bits of MXFP4: sign, two bits of exponent and one of mantissa.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 4


def in_mxfp4(folder):
    """Write a tiny gpt-oss whose experts are in MXFP4, and return its weights."""
    model = tiny_mixtures.make_mixture("gpt_oss", dtype=torch.bfloat16, intermediate_size=32)
    generator = torch.Generator().manual_seed(0)
    weights, stored = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            weights[name] = stored[name] = tensor.contiguous()
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        # Scales are powers of two, with their exponents as bytes.
        scales = torch.randint(122, 125, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        values = torch.cat([FP4, -FP4])[nibbles] * (scales.float() - 127).exp2()[..., None]
        weights[name] = values.flatten(-2).transpose(1, 2).to(tensor.dtype)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    _write(model, folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return weights


def in_fp8(folder):
    """Write a tiny DeepSeek-V3 whose linears are in FP8, in blocks with a scale each, and return its weights."""
    model = tiny_mixtures.make_mixture("deepseek_v3", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    stored = dict(weights)
    for name, tensor in weights.items():
        if tensor.dim() < 2 or "embed" in name or "lm_head" in name or name.endswith("mlp.gate.weight"):
            continue
        blocks = tensor.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        stored[name] = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        rounded = stored[name].float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        weights[name] = (rounded * scales[:, None, :, None]).flatten(2).flatten(0, 1).to(tensor.dtype)
    quantization = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    _write(model, folder, stored, quantization)
    return weights


def _write(model, folder, stored, quantization):
    model.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tiny.make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module", params=[in_mxfp4, in_fp8], ids=["mxfp4", "fp8"])
def quantized(request, tmp_path_factory):
    """The folder of a quantized mixture, and the weights that it stands for by their names in a stock checkpoint."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    weights = request.param(folder)
    return folder, weights


@pytest.mark.parametrize("low_memory", [False, True])
def test_quantized_mixtures_are_dequantized_pruned_and_saved_as_plain_checkpoints(
    quantized, low_memory, tokens, tmp_path, caplog
):
    folder, weights = quantized
    pruner = FwdPruner.from_pretrained(folder, low_memory=low_memory)
    assert "is quantized" in caplog.text and "are dequantized while they are loaded" in caplog.text
    # Nothing tells it from a model that was never quantized.
    assert not hasattr(pruner.model, "hf_quantizer") and not hasattr(pruner.model.config, "quantization_config")
    pruner.prune(None, tokens, kinds=["expert"], method="magnitude", reconstruction="none", sparsity=0.5)
    pruner.save_pretrained(tmp_path / "pruned")

    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    stored = {}
    for file in (tmp_path / "pruned").glob("*.safetensors"):
        stored |= load_file(file)
    for name, tensor in stored.items():
        assert not name.endswith(("_blocks", "_scales", "_scale_inv"))
        dense, kept = _dense(name, pruner.plan, weights)
        assert torch.equal(tensor, dense if kept is None else dense[kept]), name
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert not hasattr(reloaded, "hf_quantizer") and reloaded(tokens[:1]).logits.isfinite().all()


def _dense(name, plan, weights):
    """The dense tensor of which one of the pruned model is a part, and the experts of this part."""
    if ".mlp." not in name:
        return weights[name], None
    kept = plan.kept.get((int(name.split(".")[2]), "expert"))
    path, found, rest = name.partition(".experts.")
    number, _, own = rest.partition(".")
    if found and number.isdigit():
        return weights[f"{path}.experts.{kept[int(number)]}.{own}"], None
    per_expert = found or ".gate." in name or ".router." in name
    return weights[name], kept if per_expert and kept is not None else None


def test_formats_that_transformers_does_not_dequantize_are_refused_with_how(tmp_path):
    model = tiny_mixtures.make_mixture("mixtral")
    _write(model, tmp_path / "int8", model.state_dict(), {"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match=r"would be loaded quantized \(bitsandbytes\).*dequantize\(\) was called"):
        FwdPruner.from_pretrained(tmp_path / "int8")
