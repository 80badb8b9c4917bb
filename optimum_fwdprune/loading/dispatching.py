"""The distribution of a model over devices, memory and disk, which can be applied to another model."""

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
    """A model is complete, but could not be distributed.

    Args:
        model (`PreTrainedModel`): the model, without any of accelerate's hooks.
    """

    def __init__(self, message: str, model: PreTrainedModel):
        super().__init__(message)
        self.model = model


@dataclass(frozen=True)
class Placement:
    """The settings that accelerate distributed a model with.

    Args:
        device_map (`dict`, *optional*): module names to devices, as in `hf_device_map`; `None` without one.
        hooked (`bool`): whether modules have accelerate's hooks.
        main_device (`torch.device` or `str`, *optional*): device of inputs and of computations with offloaded weights.
        offload_buffers (`bool`): whether buffers are offloaded too.
        skip_keys (`list[str]`, *optional*): names of inputs that are not moved between devices.
        preloading (`list[str]`): names of modules that load the weights of all their submodules at once.
        on_disk (`frozenset[str]`): names of the parameters that are stored in files.
        folder (`Path`, *optional*): folder of such files that accelerate was set up with.
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
        """Return the placement of `model`, read from its hooks."""
        hooks = [(name, hook) for name, module in model.named_modules() for hook in hooks_of(module)]
        offloading = [(name, hook) for name, hook in hooks if hook.offload]
        # The first hook is that of the whole model, which has the main device unless all of the model is offloaded.
        devices = (hook.execution_device for _, hook in hooks if hook.execution_device is not None)
        folders = (getattr(getattr(hook.weights_map, "dataset", None), "save_folder", None) for _, hook in offloading)
        folder = next((folder for folder in folders if folder is not None), None)
        if (own := model.__dict__.get("_offload_files")) is not None:
            # The model's own folder will be removed together with the model.
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
        """Return files for the parameters that belong on disk; `None` where there are none."""
        return OffloadFiles(self.folder) if self.on_disk else None

    def apply(self, model: PreTrainedModel, files: OffloadFiles | None) -> PreTrainedModel:
        """Distribute `model`, whose modules have the same names as the original model's, and return it.

        Args:
            model (`PreTrainedModel`): the model. Its parameters are on the devices of the original ones; those that
                were offloaded are on the CPU, or on the meta device if they belong on disk.
            files (`OffloadFiles`, *optional*): the parameters that belong on disk.

        Raises:
            PlacementError: where accelerate fails.
        """
        try:
            return self._apply(model, files)
        except Exception as error:
            remove_hook_from_submodules(model)
            raise PlacementError(
                f"The pruned model is complete, but could not be distributed like the dense one: {error} Its weights "
                f"are on the same devices as before; distribute it with accelerate.dispatch_model.",
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
            # The files exist as long as the model does, and are shared by its copies.
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
        parent (`Path`, *optional*): folder to create it in; by default the system's folder for temporary files.
    """

    def __init__(self, parent: Path | None):
        self._temporary = tempfile.TemporaryDirectory(prefix="pruned-", dir=parent)
        self.folder = Path(self._temporary.name)
        self._index: dict[str, dict[str, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadFiles:
        return self

    @property
    def names(self) -> set[str]:
        """Names of the parameters and buffers that were written."""
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
            model (`nn.Module`): the model of these parameters. Tied parameters are read from the same file.
            with_buffers (`bool`): whether buffers are offloaded too.
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
