"""The entry point for vLLM; what vLLM then computes is compared by `make vllm`, which needs vLLM."""

import sys
import types
from importlib.metadata import entry_points

import transformers

import optimum_fwdprune.models.pruned_llama
from optimum_fwdprune import architectures


def test_vllm_is_told_of_every_pruned_causal_language_model(monkeypatch):
    registered = {}
    vllm = types.ModuleType("vllm")
    vllm.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    (entry,) = entry_points(group="vllm.general_plugins", name="fwdprune")
    entry.load()()

    families = ("Llama", "Mistral", "OPT", "Bloom", "Qwen2", "Qwen3")
    assert registered.keys() >= {f"Pruned{family}ForCausalLM" for family in families}
    assert not any("Classification" in name or name.endswith("Model") for name in registered)
    assert all(where.endswith(":TransformersForCausalLM") for where in registered.values())
    # The entry point's import has also told transformers.
    config = optimum_fwdprune.models.pruned_llama.PrunedLlamaConfig
    assert type(transformers.AutoConfig.for_model("pruned_llama")) is config
    classes = [
        model_class for family in architectures.registered_architectures() for model_class in family.model_classes
    ]
    assert registered.keys() >= {name for name in (cls.__name__ for cls in classes) if name.endswith("ForCausalLM")}
