"""How a model is distributed over devices, memory and disk, and another one distributed in the same way."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel

from ..files import naming_what_is_full, save_weights_atomically, write_text_atomically
from ..runs.devices import hooks_of
from .offloading import lies_in_files


class PlacementError(RuntimeError):
    """A model is whole, and could not be distributed.

    Args:
        model (`PreTrainedModel`): the model, without any of accelerate's hooks.
    """

    def __init__(self, message: str, model: PreTrainedModel):
        super().__init__(message)
        self.model = model


@dataclass(frozen=True)
class Placement:
    """What accelerate was asked for when it distributed a model.

    Args:
        device_map (`dict`, *optional*): module names to devices, as in `hf_device_map`; `None` without one.
        hooked (`bool`): whether accelerate's hooks are in place.
        main_device (`torch.device` or `str`, *optional*): where inputs go, and where offloaded weights compute.
        offload_buffers (`bool`): whether buffers are offloaded too.
        skip_keys (`list[str]`, *optional*): inputs that stay where they are.
        preloading (`list[str]`): names of the modules that fetch the weights of all their submodules at once.
        on_disk (`frozenset[str]`): names of the parameters that lie in files.
        folder (`Path`, *optional*): where accelerate was told to keep such files.
    """

    device_map: dict[str, Any] | None
    hooked: bool
    main_device: Any
    offload_buffers: bool
    skip_keys: Any
    preloading: Sequence[str]
    on_disk: frozenset[str]
    folder: Path | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Placement:
        """Read off `model` how it is distributed."""
        hooks = [(name, hook) for name, module in model.named_modules() for hook in hooks_of(module)]
        offloading = [(name, hook) for name, hook in hooks if hook.offload]
        # The hook of the whole model is the first, and has the main device, except where all of it is offloaded.
        devices = (hook.execution_device for _, hook in hooks if hook.execution_device is not None)
        folders = (getattr(getattr(hook.weights_map, "dataset", None), "save_folder", None) for _, hook in offloading)
        folder = next((folder for folder in folders if folder is not None), None)
        if (own := model.__dict__.get("_offload_files")) is not None:
            # A folder of its own, which will be gone with that model.
            folder = own.folder.parent
        device_map = getattr(model, "hf_device_map", None)
        return cls(
            device_map=dict(device_map) if device_map else None,
            hooked=bool(hooks),
            main_device=next(devices, None),
            offload_buffers=any(hook.offload_buffers for _, hook in offloading),
            skip_keys=next((hook.skip_keys for _, hook in hooks), None),
            preloading=[name for name, hook in offloading if hook.place_submodules],
            on_disk=frozenset(
                name for name, tensor in model.named_parameters() if tensor.is_meta and lies_in_files(model, name)
            ),
            folder=None if folder is None else Path(folder),
        )

    def renamed(self, after: Callable[[str], str | None]) -> Placement:
        """Return the placement of a model that lacks modules of the first one.

        Args:
            after (`Callable`): the name of a module of the first model in, its name in the other one out; `None` where
                the other one lacks it.
        """
        device_map = None if self.device_map is None else _renamed(self.device_map, after)
        return replace(self, device_map=device_map, preloading=list(_renamed(dict.fromkeys(self.preloading), after)))

    def files(self) -> OffloadFiles | None:
        """Return files for what is to lie on disk; `None` where nothing is."""
        return OffloadFiles(self.folder) if self.on_disk else None

    def apply(self, model: PreTrainedModel, files: OffloadFiles | None) -> PreTrainedModel:
        """Distribute `model`, whose modules are named as those of the first one, and return it.

        Args:
            model (`PreTrainedModel`): every parameter lies where it lay in the first one, or on the CPU where it was
                offloaded there; what lies on disk is on the meta device.
            files (`OffloadFiles`, *optional*): what lies on disk.

        Raises:
            PlacementError: where that fails.
        """
        try:
            return self._apply(model, files)
        except Exception as error:
            remove_hook_from_submodules(model)
            raise PlacementError(
                f"The pruned model is whole, and could not be distributed as the dense one was: {error} Its weights "
                f"lie where they lay before; distribute it with accelerate.dispatch_model.",
                model,
            ) from error

    def _apply(self, model: PreTrainedModel, files: OffloadFiles | None) -> PreTrainedModel:
        options: dict[str, Any] = {
            "offload_buffers": self.offload_buffers,
            "preload_module_classes": sorted({type(model.get_submodule(name)).__name__ for name in self.preloading}),
        }
        folder = None
        if files is not None:
            folder = files.finish(model, self.offload_buffers)
            # The files are there as long as the model is, and copies of the model read the same ones.
            model.__dict__["_offload_files"] = files
        if self.device_map is not None and self.hooked:
            options |= {"skip_keys": self.skip_keys, "main_device": self.main_device, "force_hooks": True}
            return dispatch_model(model, self.device_map, offload_dir=folder, **options)
        if self.device_map is not None:
            model.__dict__["hf_device_map"] = dict(self.device_map)
        elif folder is not None:
            disk_offload(model, folder, self.main_device, **options)
        elif self.hooked and self.main_device is not None:
            cpu_offload(model, self.main_device, **options)
        return model


def _renamed(values: dict[str, Any], after: Callable[[str], str | None]) -> dict[str, Any]:
    return {name: value for before, value in values.items() if (name := after(before)) is not None}


class OffloadFiles:
    """Offloaded weights of one model in a folder of their own, which is removed with this object.

    Args:
        parent (`Path`, *optional*): where to make the folder; by default where the system keeps temporary files.
    """

    def __init__(self, parent: Path | None):
        self._temporary = tempfile.TemporaryDirectory(prefix="pruned-", dir=parent)
        self.folder = Path(self._temporary.name)
        self._index: dict[str, dict[str, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadFiles:
        return self

    @property
    def names(self) -> set[str]:
        """Names of what was written."""
        return set(self._index)

    def add(self, name: str, value: torch.Tensor) -> None:
        """Write a parameter or a buffer."""
        file = self.folder / f"{name}.safetensors"
        with naming_what_is_full(file):
            save_weights_atomically(file, {name: value})
        dtype = str(value.dtype).removeprefix("torch.")
        self._index[name] = {"safetensors_file": str(file), "weight_name": name, "dtype": dtype}

    def finish(self, model: nn.Module, with_buffers: bool) -> Path:
        """Write the index that accelerate reads, and return the folder.

        Args:
            model (`nn.Module`): whose parameters these are. A tied parameter is read from the file of the other.
            with_buffers (`bool`): buffers are offloaded too.
        """
        written = {id(model.get_parameter(name)): entry for name, entry in self._index.items()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.is_meta and name not in self._index:
                self._index[name] = written[id(parameter)]
        if with_buffers:
            saved = model.state_dict().keys()
            for name, buffer in model.named_buffers():
                if name in saved:
                    self.add(name, buffer)
        write_text_atomically(self.folder / "index.json", json.dumps(self._index))
        return self.folder
