"""Checkpoints of models whose layers stay on disk: layers are written one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..architectures import get_architecture
from ..files import save_weights_atomically, write_text_atomically
from ..loading.offloading import on_disk, read_parameter
from ..loading.saving import generation_config_as_it_is
from ..loading.workspace import Workspace
from ..models.per_layer import attention_implementations
from .renaming import Renaming
from .surgery import Cuts, slice_tensor


# The name of the checkpoint in the workspace.
CHECKPOINT = "checkpoint"


def files_of(model: PreTrainedModel) -> Path | None:
    """Return the folder of the files of a pruned model that is read from disk, or `None` for any other model."""
    workspace: Workspace | None = model.__dict__.get("_workspace")
    return None if workspace is None else workspace.folder / CHECKPOINT


class LayeredCheckpoint:
    """A checkpoint in a workspace, with one file of weights per layer and one for all other weights.

    Args:
        workspace (`Workspace`): the folder of the checkpoint and of its parts.
        model (`PreTrainedModel`): the model whose weights are written, with offloaded layers.
        pruned (`PreTrainedModel`): the model that the checkpoint is one of, whose weights may be on the meta device.
        renaming (`Renaming`, *optional*): the names of its weights in `model`; by default they are the same.
    """

    def __init__(
        self, workspace: Workspace, model: PreTrainedModel, pruned: PreTrainedModel, renaming: Renaming | None = None
    ):
        self.folder = workspace.folder / CHECKPOINT
        self._workspace = workspace
        self._model, self._pruned = model, pruned
        self._layers = [f"{name}." for name, _ in get_architecture(model.config).layers(model)]
        tied: Mapping[str, str] = getattr(pruned, "all_tied_weights_keys", {})
        # Names in the pruned model, with those in the dense model.
        self._names = {
            name: name if renaming is None else renaming.before(name)
            for name in pruned.state_dict()
            if name not in tied
        }

    def write_rest(self) -> None:
        """Write the weights outside of layers, unless they are written already."""
        if self._summary(0).exists():
            return
        # This writes all files but weights, and removes older weights from the folder.
        with generation_config_as_it_is(self._pruned, self.folder):
            self._pruned.save_pretrained(self.folder, state_dict={})
        names = [name for name in self._names if not name.startswith(tuple(self._layers))]
        self._write(0, {name: read_parameter(self._model, self._names[name]) for name in names}, {})

    def write_layer(
        self, number: int, cuts: Cuts, replaced: Mapping[str, torch.Tensor], details: dict[str, Any]
    ) -> None:
        """Write the kept part of a layer.

        Args:
            number (`int`): index of the layer in the model.
            cuts (`Cuts`): the kept indices of its parameters; empty where nothing is cut.
            replaced (mapping of `str` to `Tensor`): new values of some of its parameters, by their names in the model.
            details (`dict`): JSON values, which [`finish`] returns.
        """
        tensors = {}
        for name, dense in self._names.items():
            if dense.startswith(self._layers[number]):
                value = replaced.get(dense)
                if value is None:
                    value = slice_tensor(dense, read_parameter(self._model, dense), cuts)
                tensors[name] = value
        self._write(number + 1, tensors, details)

    def _write(self, part: int, tensors: dict[str, torch.Tensor], details: dict[str, Any]) -> None:
        # A removed layer has no tensors.
        if tensors:
            save_weights_atomically(self._file(part), tensors)
        summary = {"bytes": sum(tensor.nbytes for tensor in tensors.values()), "details": details}
        write_text_atomically(self._summary(part), json.dumps(summary))

    def finish(self) -> dict[str, Any]:
        """Write the index of the files, and return the details of every layer."""
        weight_map = {name: self._file(0).name for name in self._names}
        for number, prefix in enumerate(self._layers):
            file = self._file(number + 1).name
            weight_map |= {name: file for name, dense in self._names.items() if dense.startswith(prefix)}
        summaries = [
            json.loads(self._summary(part).read_text(encoding="utf-8")) for part in range(len(self._layers) + 1)
        ]
        metadata = {
            "total_parameters": sum(parameter.numel() for parameter in self._pruned.parameters()),
            "total_size": sum(part["bytes"] for part in summaries),
        }
        index = {"metadata": metadata, "weight_map": weight_map}
        write_text_atomically(self.folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")
        return {name: value for part in summaries for name, value in part["details"].items()}

    def load(self) -> PreTrainedModel:
        """Return the model of the checkpoint, with its layers on disk; the files exist as long as it does."""
        model: PreTrainedModel = self._model
        model_class: Any = type(self._pruned)
        loaded: PreTrainedModel = model_class.from_pretrained(
            self.folder,
            device_map=on_disk(model, model.device),
            dtype=model.dtype,
            attn_implementation=attention_implementations(model.config),
            experts_implementation=model.config.get_text_config()._experts_implementation,
        )
        # The model needs the workspace as long as it exists, also after its pruner is deleted.
        loaded.__dict__["_workspace"] = self._workspace
        # The name of the model stays the one before, and not the path of the workspace.
        loaded.config._name_or_path = model.config._name_or_path
        return loaded.train(model.training)

    def _file(self, part: int) -> Path:
        return self.folder / f"model-{part + 1:05d}-of-{len(self._layers) + 1:05d}.safetensors"

    def _summary(self, part: int) -> Path:
        return self.folder.parent / f"about-{part}.json"
