"""What is not a plain model is refused before any work, with the way to the plain model."""

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.export import export_gguf, export_stock


LORA = LoraConfig(r=2, target_modules=["q_proj"])


def compiled_inside():
    model = tiny.make_model("llama_gqa_biases")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def compiled_in_place():
    model = tiny.make_model("llama_gqa_biases")
    model.compile()
    return model


def with_tensors_of_a_subclass():
    class Quantized(torch.Tensor):
        pass

    model = tiny.make_model("llama_gqa_biases")
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Quantized))
    return model


WRAPPED = {
    "name": (lambda: "someone/model", r"from_pretrained\('someone/model'\)"),
    "nothing": (lambda: None, "PreTrainedModel.*got a NoneType"),
    "class": (lambda: transformers.LlamaForCausalLM, "PreTrainedModel.*got a type"),
    "peft": (lambda: get_peft_model(tiny.make_model("llama_gqa_biases"), LORA), r"model\.merge_and_unload\(\)"),
    "prompts": (
        lambda: get_peft_model(
            tiny.make_model("llama_gqa_biases"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        ),
        r"model\.get_base_model\(\)",
    ),
    "compiled": (lambda: torch.compile(tiny.make_model("llama_gqa_biases")), r"wrapper\._orig_mod"),
    "compiled in place": (compiled_in_place, "LlamaForCausalLM is compiled"),
    "compiled inside": (compiled_inside, r"model\.layers\.1 is compiled"),
    "data parallel": (lambda: torch.nn.DataParallel(tiny.make_model("llama_gqa_biases")), r"wrapper\.module"),
    "pipeline": (
        lambda: transformers.pipeline(
            "text-generation", model=tiny.make_model("llama_gqa_biases"), tokenizer=tiny.make_tokenizer()
        ),
        r"wrapper\.model",
    ),
    "tensor subclass": (with_tensors_of_a_subclass, r"layers\.1\.mlp\.up_proj\.weight is a Quantized"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_not_a_plain_model_is_refused_with_the_way_to_one(name):
    make, message = WRAPPED[name]
    with pytest.raises(ValueError, match=message):
        FwdPruner(make())


def test_a_quantized_model_is_refused_and_a_dequantized_one_is_not(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="would be loaded quantized"):
        FwdPruner.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    with pytest.raises(ValueError, match=r"quantized \(bitsandbytes\).*dequantize"):
        FwdPruner(model)
    FwdPruner(model.dequantize())


def test_a_folder_of_adapters_is_refused_before_anything_is_loaded(tmp_path):
    get_peft_model(tiny.make_model("llama_gqa_biases"), LORA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds adapters.*merge_and_unload\(\).*save_pretrained"):
        FwdPruner.from_pretrained(tmp_path)


def test_from_pretrained_takes_names_alone():
    with pytest.raises(ValueError, match=r"got a LlamaForCausalLM\. FwdPruner\(model, tokenizer\)"):
        FwdPruner.from_pretrained(tiny.make_model("llama_gqa_biases"))


@pytest.mark.parametrize("write", [export_stock, export_gguf])
def test_models_with_adapters_are_not_exported(write, tmp_path):
    pruned = FwdPruner(tiny.make_model("llama_gqa_biases")).prune(
        method="magnitude", kinds=["mlp"], reconstruction="none", layout="stock", sparsity=0.3
    )
    pruned.add_adapter(LORA)
    with pytest.raises(ValueError, match=r"q_proj has an adapter, which.*merge_and_unload\(\)"):
        write(pruned, tiny.make_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
