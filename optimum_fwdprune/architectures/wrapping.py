"""Models that are wrapped, adapted, compiled or quantized: recognised, and refused with the way to the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# Where a wrapper keeps the model: `torch.compile`; DDP, FSDP, DataParallel and DeepSpeed; pipelines and trainers.
INSIDE = ("_orig_mod", "module", "model", "pretrained_model")

# Of a tensor or parameter without anything added to it.
PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def check_plain(model: Any) -> None:
    """Raise `ValueError` where `model` is not a transformers model in memory with plain weights, and name the way to
    one: a path, a wrapper around a model, adapters inside it, compiled parts, quantized or sharded weights."""
    if isinstance(model, (str, Path)):
        raise ValueError(
            f"FwdPruner takes a model in memory, and {str(model)!r} is a name. "
            f"FwdPruner.from_pretrained({str(model)!r}) loads the model and its tokenizer."
        )
    if is_peft_model(model):
        # Learned prompts are no part of any weight.
        way_out = "merge_and_unload" if hasattr(model, "merge_and_unload") else "get_base_model"
        raise ValueError(
            f"A {type(model).__name__} holds a model with adapters, and a plain model is needed: "
            f"FwdPruner(model.{way_out}(), tokenizer)."
        )
    if not isinstance(model, PreTrainedModel):
        inner = model_inside(model)
        if inner is not None:
            raise ValueError(
                f"FwdPruner takes a transformers model, and a {type(model).__name__} is an object around one. Pass "
                f"the model itself, its attribute {inner!r}: FwdPruner(wrapper.{inner}, tokenizer)."
            )
        raise ValueError(
            f"FwdPruner takes a transformers model (PreTrainedModel); got a {type(model).__name__}. "
            f"FwdPruner.from_pretrained loads one from a folder or a repository of the Hub."
        )
    check_no_adapters(model, "cannot be cut")
    _check_not_compiled(model)
    _check_not_quantized(model)


def check_in_memory(model: Any) -> None:
    """Raise `TypeError` where `model` is no transformers model in memory, with adapters or without."""
    if not isinstance(model, PreTrainedModel) and not is_peft_model(model):
        raise TypeError(
            f"model must be a transformers model in memory (PreTrainedModel); got a {type(model).__name__}. "
            f"FwdPruner.from_pretrained loads one as its attribute model."
        )


def model_inside(wrapper: Any) -> str | None:
    """Return the attribute in which an object keeps a model, or `None` where it keeps none."""
    return next((name for name in INSIDE if isinstance(getattr(wrapper, name, None), nn.Module)), None)


def is_peft_model(model: Any) -> bool:
    """Whether `model` is a `PeftModel` or another class of PEFT; PEFT is not imported."""
    return any(base.__module__.partition(".")[0] == "peft" for base in type(model).__mro__)


def plain_model(model: Any) -> Any:
    """Return the model that a `PeftModel` is around; any other object as it is."""
    return model.get_base_model() if is_peft_model(model) and hasattr(model, "get_base_model") else model


def adapted_module(model: nn.Module) -> str | None:
    """Return the name of the first module of `model` that PEFT put there, or `None` where there is none."""
    return next((name for name, module in model.named_modules() if name and is_peft_model(module)), None)


def check_no_adapters(model: nn.Module, consequence: str) -> None:
    """Raise `ValueError` where PEFT has put adapters around modules of `model`.

    Args:
        model (`Module`): also one that `get_peft_model` or `add_adapter` changed in place.
        consequence (`str`): what follows for the module, such as `"cannot be cut"`.
    """
    name = adapted_module(model)
    if name is not None:
        raise ValueError(
            f"{name} has an adapter around it, which {consequence}. Merge the adapters into the weights first: "
            f"merge_and_unload() of the PeftModel returns the plain model, and unload() returns it without them. "
            f"Adapters of add_adapter are saved by model.save_pretrained, and PeftModel.from_pretrained puts them on "
            f"the model loaded anew."
        )


def _check_not_compiled(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or type(model).__name__} is compiled, and compiled code does not run the hooks that measure "
                f"units. Load the model again without compiling it, and compile the pruned model."
            )


def _unpacked(quantizer: Any) -> bool:
    """Whether the quantizer of a model gave it plain weights, as that of a GGUF file does where it is asked to."""
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
            f"it unquantized, or call model.dequantize() where its quantizer can; quantize the pruned model."
        )
    for name, parameter in model.named_parameters():
        for kind in (type(parameter), type(parameter.data)):
            if kind not in PLAIN_TENSORS:
                raise ValueError(
                    f"{name} is a {kind.__name__}, which cannot be cut: it is quantized, or divided among several "
                    f"processes. Load the model unquantized and undivided."
                )
