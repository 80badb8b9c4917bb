"""The entry point for vLLM; what vLLM then computes is compared by `make vllm`, which needs vLLM."""

import subprocess
import sys
import types
from importlib.metadata import entry_points

import pytest
import transformers

import optimum_fwdprune.models.pruned_llama
from optimum_fwdprune import architectures


def test_vllm_is_told_of_every_pruned_causal_language_model(monkeypatch):
    registered = {}
    vllm = types.ModuleType("vllm")
    vllm.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    (entry,) = entry_points(group="vllm.general_plugins", name="fwdprune")
    with monkeypatch.context() as patch:
        # Every process of vLLM loads the plugin, for models of all kinds.
        patch.setattr(architectures.registry, "import_family", lambda name: pytest.fail(f"{name} was imported"))
        entry.load()()

    assert all(where.endswith(":TransformersForCausalLM") for where in registered.values())
    # The entry point's import has also told transformers.
    config = optimum_fwdprune.models.pruned_llama.PrunedLlamaConfig
    assert type(transformers.AutoConfig.for_model("pruned_llama")) is config
    assert registered.keys() == {
        model_class.__name__
        for family in architectures.registered_architectures()
        for model_class in family.model_classes
        if model_class._auto_class == "AutoModelForCausalLM"
    }


def test_the_entry_point_needs_no_package_that_vllm_lacks():
    """An environment for serving may have this package without its dependencies."""
    lacking = ("accelerate", "datasets", "evaluate", "gguf", "optimum", "peft", "rich")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking})); "
        f"from importlib.metadata import entry_points; "
        f"(entry,) = entry_points(group='vllm.general_plugins', name='fwdprune'); entry.load()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
