"""Checks for models that are wrapped, adapted, compiled or quantized, whose errors name the way to a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# The attributes of wrappers with the model: `torch.compile`; DDP, FSDP, DataParallel and DeepSpeed; pipelines and
# trainers.
INSIDE = ("_orig_mod", "module", "model", "pretrained_model")

# The types of plain tensors and parameters.
PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def check_plain(model: Any) -> None:
    """Raise `ValueError` where `model` is not a transformers model in memory with plain weights, and name the way to
    one: for a path, a wrapper, adapters, compiled modules, and quantized or sharded weights."""
    if isinstance(model, (str, Path)):
        raise ValueError(
            f"FwdPruner takes a model in memory, and {str(model)!r} is a name. Use "
            f"FwdPruner.from_pretrained({str(model)!r}), which loads the model and its tokenizer."
        )
    if is_peft_model(model):
        # Learned prompts cannot be merged into weights.
        way_out = "merge_and_unload" if hasattr(model, "merge_and_unload") else "get_base_model"
        raise ValueError(
            f"A {type(model).__name__} contains a model with adapters, and FwdPruner needs a plain model: "
            f"FwdPruner(model.{way_out}(), tokenizer)."
        )
    if not isinstance(model, PreTrainedModel):
        inner = model_inside(model)
        if inner is not None:
            raise ValueError(
                f"FwdPruner takes a transformers model, and a {type(model).__name__} is a wrapper of one. Pass the "
                f"model, its attribute {inner!r}: FwdPruner(wrapper.{inner}, tokenizer)."
            )
        raise ValueError(
            f"FwdPruner takes a transformers model (PreTrainedModel); got a {type(model).__name__}. Use "
            f"FwdPruner.from_pretrained, which loads a model from a folder or a repository of the Hub."
        )
    check_no_adapters(model, "cannot be cut")
    _check_not_compiled(model)
    _check_not_quantized(model)


def check_in_memory(model: Any) -> None:
    """Raise `TypeError` where `model` is not a transformers model in memory, with or without adapters."""
    if not isinstance(model, PreTrainedModel) and not is_peft_model(model):
        raise TypeError(
            f"model must be a transformers model in memory (PreTrainedModel); got a {type(model).__name__}. Use "
            f"FwdPruner.from_pretrained, whose attribute model is the loaded model."
        )


def model_inside(wrapper: Any) -> str | None:
    """Return the attribute of an object that is a model, or `None` if there is none."""
    return next((name for name in INSIDE if isinstance(getattr(wrapper, name, None), nn.Module)), None)


def is_peft_model(model: Any) -> bool:
    """Return whether `model` is a `PeftModel` or another class of PEFT, without importing PEFT."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(model).__mro__)


def plain_model(model: Any) -> Any:
    """Return the model inside a `PeftModel`; other objects are returned unchanged."""
    return model.get_base_model() if is_peft_model(model) and hasattr(model, "get_base_model") else model


def adapted_module(model: nn.Module) -> str | None:
    """Return the name of the first module of `model` that PEFT has added, or `None` if there is none."""
    return next((name for name, module in model.named_modules() if name and is_peft_model(module)), None)


def check_no_adapters(model: nn.Module, consequence: str) -> None:
    """Raise `ValueError` where PEFT has added adapters to modules of `model`.

    Args:
        model (`Module`): the model, which `get_peft_model` or `add_adapter` may have changed in place.
        consequence (`str`): the consequence for the module, such as `"cannot be cut"`.
    """
    name = adapted_module(model)
    if name is not None:
        raise ValueError(
            f"{name} has an adapter, which {consequence}. Merge the adapters into the weights first: "
            f"merge_and_unload() of the PeftModel returns the plain model, and unload() returns it without them. "
            f"Adapters of add_adapter can be saved by model.save_pretrained, and PeftModel.from_pretrained adds them "
            f"to a newly loaded model."
        )


def _check_not_compiled(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or type(model).__name__} is compiled, and compiled code does not run the hooks that measure "
                f"units. Load the model again without compiling it, and compile the pruned model."
            )


def _unpacked(quantizer: Any) -> bool:
    """Return whether the quantizer of a model has dequantized its weights, for example those of a GGUF file."""
    config = quantizer.quantization_config
    return getattr(config, "dequantize", False) or (
        getattr(config.quant_method, "value", config.quant_method) == "gguf" and not quantizer.packed_modules
    )


def _check_not_quantized(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not _unpacked(quantizer):
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"The model is quantized ({getattr(method, 'value', method)}), and quantized weights cannot be cut. Load "
            f"it unquantized, or call model.dequantize() if its quantizer allows it, and quantize the pruned model."
        )
    for name, parameter in model.named_parameters():
        for kind in (type(parameter), type(parameter.data)):
            if kind not in PLAIN_TENSORS:
                raise ValueError(
                    f"{name} is a {kind.__name__}, which cannot be cut: it is quantized, or divided among several "
                    f"processes. Load the model unquantized and undivided."
                )
