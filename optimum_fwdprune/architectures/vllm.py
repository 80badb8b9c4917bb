"""The vLLM plugin, an entry point of `vllm.general_plugins`: pruned models run on vLLM's Transformers backend."""

from __future__ import annotations

from .registry import causal_class_names


# This class runs the modules of a transformers model with vLLM's attention, with the sizes of every single layer.
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_with_vllm() -> None:
    """Register pruned causal language models with vLLM, which then loads them without `trust_remote_code`."""
    from vllm import ModelRegistry

    for name in causal_class_names():
        ModelRegistry.register_model(name, BACKEND)
