"""vLLM: pruned checkpoints for its Transformers modeling backend, as an entry point of `vllm.general_plugins`."""

from __future__ import annotations

from ..architectures import registered_architectures


# vLLM runs the modules of a transformers model with its own attention, layer by layer with the sizes of each.
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register_with_vllm() -> None:
    """Make pruned causal language models known to vLLM, which then needs no `trust_remote_code` for them."""
    from vllm import ModelRegistry

    for architecture in registered_architectures():
        for model_class in architecture.model_classes:
            if model_class._auto_class == "AutoModelForCausalLM":
                ModelRegistry.register_model(model_class.__name__, BACKEND)
