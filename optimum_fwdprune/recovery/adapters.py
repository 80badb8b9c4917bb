"""LoRA adapters: how they are added, merged, and checked before a training is resumed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..architectures.wrapping import is_peft_model
from ..models.resizing import LINEARS
from .options import RecoveryOptions


WEIGHTS_NAME = "adapter_model.safetensors"

# The value of `lora_targets` for all linears.
ALL = "all-linear"


def with_adapters(model: PreTrainedModel, options: RecoveryOptions) -> Any:
    """Return the model with new LoRA adapters, which are its only trainable parameters.

    Args:
        model (`PreTrainedModel`): dense or pruned.
        options (`RecoveryOptions`): rank, scale, dropout and targets.

    Raises:
        ImportError: where PEFT is not installed.
        ValueError: where no linear has one of the names, or an adapted weight is tied to another one.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ImportError('Adapters need PEFT: pip install "optimum-fwdprune[recovery]".') from error
    experts = expert_weights(model)
    modules, weights = _checked_targets(model, options.lora_targets, experts)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        # PEFT has no dropout before weights of experts, and adapts these in some families without being asked to.
        lora_dropout=0.0 if experts else options.lora_dropout,
        target_modules=modules,
        target_parameters=weights or None,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        with warnings.catch_warnings():
            # PEFT sets ranks of fused experts itself, and then misses their names among the modules.
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module")
            # PEFT 0.21 reads a property that transformers 5.23 renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora_targets={options.lora_targets} cannot get adapters: {error}") from error
    _check_untied(adapted)
    return adapted


def expert_weights(model: PreTrainedModel) -> set[str]:
    """Return the ends of the names of weights with an axis of experts, such as `experts.down_proj`, with the module
    that owns them; empty where the model has none."""
    return {
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def _checked_targets(model: PreTrainedModel, targets: list[str], experts: set[str]) -> tuple[Any, list[str]]:
    """Return the linears and the weights of experts that get adapters. All linears include all experts.

    Raises:
        ValueError: on a name that nothing has; the message lists the names of all linears and weights of experts.
    """
    if targets == [ALL]:
        return ALL, sorted(experts)
    modules = dict(model.named_modules())
    weights = {name for name in experts for target in targets if _has_target([name], target)}
    linears = [target for target in targets if _has_target(modules, target)]
    unknown = [target for target in targets if target not in linears and not _has_target(experts, target)]
    if targets and not unknown:
        return linears, sorted(weights)
    names = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, LINEARS)}
    names |= {name.rpartition(".")[2] for name in experts}
    wrong = f"No module has a name that ends in {unknown[0]!r}" if unknown else "lora_targets is empty"
    raise ValueError(f"{wrong}; lora_targets takes {ALL}, or some of {', '.join(sorted(names))}.")


def _has_target(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _check_untied(model: Any) -> None:
    """Remove the adapters and raise `ValueError` where an adapted weight is tied to another one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if isinstance(weight, torch.nn.Parameter) and not name.endswith(".base_layer"):
            owners.setdefault(id(weight), []).append(name)
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        sharing = [] if base is None else owners.get(id(getattr(base, "weight", None)), [])
        tied = [other for other in sharing if other != name]
        if tied:
            model.unload()
            raise ValueError(
                f"lora_targets names {name.rpartition('.')[2]!r}, whose weight is tied to that of "
                f"{tied[0].rpartition('.')[2]}: an adapter would train one of them, and merging it would change both. "
                f"Leave it out of lora_targets."
            )


def merged(model: Any) -> PreTrainedModel:
    """Return the base model with the adapters merged into its weights; an interrupted merge is undone."""
    try:
        model.merge_adapter()
    except BaseException:
        for module in model.modules():
            if is_peft_model(module) and getattr(module, "merged", False):
                module.unmerge()
        raise
    return model.unload()


def check_adapters(folder: str | Path, model: Any) -> None:
    """Raise `ValueError` where the shapes of the adapters in a folder differ from those of the model's adapters.

    Args:
        folder (`str` or `Path`): folder that PEFT or the Trainer saved.
        model (`PeftModel`): the model, with new adapters.
    """
    from peft import get_peft_model_state_dict

    file = Path(folder) / WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{folder} holds no adapters: there is no {WEIGHTS_NAME} in it.")
    own: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    try:
        with safe_open(file, framework="pt") as tensors:
            stored = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}.") from error
    for name in sorted(own.keys() | stored.keys()):
        expected = tuple(own[name].shape) if name in own else None
        if stored.get(name) != expected:
            raise ValueError(
                f"The adapters in {folder} belong to another base: {name} has the shape {stored.get(name)} there and "
                f"{expected} here. Train new adapters, or load the base that they were trained on."
            )
