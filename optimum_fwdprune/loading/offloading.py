"""Offloaded weights, which accelerate's hooks load from disk or from the CPU for every computation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures import Site, get_architecture
from ..runs.devices import compute_device, hooks_of


def device_map_on_disk(
    config: PreTrainedConfig, auto_class: Any, device: torch.device | None = None
) -> dict[str, str]:
    """Return a `device_map` that leaves the decoder layers on disk and puts all other modules on `device`, by default
    the accelerator, or the CPU where there is none."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    if device is not None:
        return on_disk(model, device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return on_disk(model, accelerator or "cpu")


def on_disk(model: PreTrainedModel, device: torch.device | str) -> dict[str, str]:
    """Return a `device_map` that leaves the decoder layers of `model` on disk and puts other modules on `device`."""
    names = [name for name, _ in get_architecture(model.config).layers(model)]
    container = names[0].rpartition(".")[0]
    device_map = {container: "disk"}
    for name, module in model.named_modules():
        if container.startswith(f"{name}.") or not name:
            # The modules that contain the layers also have other children, which are placed one by one.
            children = [*module.named_children(), *module.named_parameters(recurse=False)]
            paths = (f"{name}.{child}" if name else child for child, _ in children)
            device_map |= {path: str(device) for path in paths if not f"{container}.".startswith(f"{path}.")}
    return device_map


def lies_on_disk(model: PreTrainedModel) -> bool:
    """Whether parts of `model` are read from disk whenever they run."""
    return any(parameter.is_meta and lies_in_files(model, name) for name, parameter in model.named_parameters())


def is_offloaded(module: nn.Module) -> bool:
    """Whether a parameter of `module` is not in memory."""
    return any(parameter.is_meta for parameter in module.parameters())


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device for the tokens of a batch, also where the embeddings are offloaded."""
    if model.device.type != "meta":
        return model.device
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return compute_device(embeddings)


def inputs_of_model(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs such as pixel values on the device of the tokens, and floats in the dtype of the model."""
    device = input_device(model)
    return {
        name: values.to(device, model.dtype if values.is_floating_point() else None) for name, values in inputs.items()
    }


def check_readable(model: PreTrainedModel) -> None:
    """Raise `ValueError` where a parameter of `model` has no values anywhere."""
    if is_offloaded(model) and not any(_offloading_hooks(module) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} is on the meta device and has no weights; load it with from_pretrained."
        )


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Keep the parameters of `module` in memory, on the device that it computes on, while the context is open.

    They are read once, even if the module runs several times. They must not be changed: changes are lost afterwards.
    """
    fetched: list[tuple[AlignDevicesHook, nn.Module]] = []
    try:
        for submodule in module.modules():
            for hook in _offloading_hooks(submodule):
                # The hook is called as accelerate calls it before a forward pass.
                hook.pre_forward(submodule)
                hook.offload = False
                fetched.append((hook, submodule))
        yield
    finally:
        for hook, submodule in fetched:
            hook.offload = True
            hook.post_forward(submodule, None)


class InTurn(list):
    """A list of sites; iterating over it keeps the modules of the current site in memory."""

    def __iter__(self) -> Iterator[Site]:
        for site in super().__iter__():
            with resident(nn.ModuleList([site.output, *(coupling.module for coupling in site.couplings)])):
                yield site


def read_parameter(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Return the parameter or buffer `name` of `model`, which is read from disk or memory if it is offloaded."""
    path, _, own_name = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), own_name)
    if not tensor.is_meta:
        return tensor.data
    weights, own_name = _offloaded_weights(model, name)
    return weights[own_name]


def lies_in_files(model: PreTrainedModel, name: str) -> bool:
    """Whether the offloaded parameter `name` of `model` is read from a file whenever it is needed."""
    weights, full_name = _innermost(*_offloaded_weights(model, name))
    return isinstance(weights, OffloadedWeightsLoader) and full_name not in weights.state_dict


def file_of(model: PreTrainedModel, name: str) -> Path | None:
    """Return the safetensors file that holds the offloaded parameter `name` of `model` under this name; `None` where
    it is read from memory or from another kind of file."""
    weights, full_name = _innermost(*_offloaded_weights(model, name))
    if not isinstance(weights, OffloadedWeightsLoader) or full_name in weights.state_dict:
        return None
    place = weights.index.get(full_name, {})
    file = place.get("safetensors_file")
    return Path(file) if file is not None and place.get("weight_name", full_name) == name else None


def _innermost(weights: Any, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """Return the map of weights that a prefixed one reads from, and the name of the weight in it."""
    while isinstance(weights, PrefixedDataset):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    return weights, name


def _offloaded_weights(model: PreTrainedModel, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """Return the map of weights of an offloaded parameter, and its name in it; the hook may be that of a parent."""
    path, _, own_name = name.rpartition(".")
    while True:
        for hook in _offloading_hooks(model.get_submodule(path)):
            return hook.weights_map, own_name
        if not path:
            raise ValueError(f"{name} is on the meta device, and no hook of accelerate can load its values.")
        path, _, parent = path.rpartition(".")
        own_name = f"{parent}.{own_name}"


def _offloading_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    return [hook for hook in hooks_of(module) if hook.offload]
