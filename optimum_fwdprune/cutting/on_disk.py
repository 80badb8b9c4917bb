"""Cutting a model on disk: layers are written one at a time, and read again in every forward pass."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..allocation.job import Job
from ..allocation.plan import PruningPlan
from ..architectures import get_architecture
from ..data.calibration import Calibration
from ..files import naming_what_is_full, save_weights_atomically, write_text_atomically
from ..loading.offloading import on_disk, read_parameter
from ..loading.saving import generation_config_as_it_is
from ..loading.subject import Subject
from ..models.per_layer import attention_implementations
from ..reconstruction.bias import kinds_gaining_bias
from ..reconstruction.reconstruction import Reconstruction
from ..runs.progress import progress
from ..runs.shelves import Shelf
from .renaming import Renaming
from .surgery import (
    Cuts,
    empty_pruned_model,
    plan_cuts,
    replaced_parameters,
    slice_tensor,
)


# The name of the checkpoint in the workspace.
CHECKPOINT = "checkpoint"


class Workspace:
    """A folder for the files of a pruned model that is read from disk.

    Args:
        parent (`str` or `Path`, *optional*): the folder in which a temporary folder is created, which is removed with
            this object; by default the system's folder for temporary files.
        kept (`Path`, *optional*): a folder to use instead, which is not removed.
    """

    def __init__(self, parent: str | Path | None = None, kept: Path | None = None):
        if kept is not None:
            self.folder = kept
            return
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix=".fwdprune-", dir=parent)
        self.folder = Path(self._temporary.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        # Copies of a model read the same files.
        return self


def files_of(model: PreTrainedModel) -> Path | None:
    """Return the folder of the files of a pruned model that is read from disk, or `None` for any other model."""
    workspace: Workspace | None = model.__dict__.get("_workspace")
    return None if workspace is None else workspace.folder / CHECKPOINT


class OnDisk:
    """A [`~optimum_fwdprune.cutting.cut.Place`] that writes the kept part of a layer as soon as it is reconstructed.

    The workspace then has the checkpoint, with one file of weights per layer and one for all other weights, and the
    state from which an interrupted run resumes. The dense model is not changed.

    Args:
        subject (`Subject`): the dense model with all its sites, whose layers are offloaded.
        plan (`PruningPlan`): the units that the sites keep.
        job (`Job`): the reconstruction of the request, and the folder for states.
        calibration (`Calibration`, *optional*): the tokens of the reconstruction.
    """

    done: Sequence[Reconstruction] = ()

    def __init__(self, subject: Subject, plan: PruningPlan, job: Job, calibration: Calibration | None):
        kept = {str(key): units for key, units in plan.kept.items()}
        self.workspace = Workspace(subject.work_folder, job.resume.folder("streamed", calibration, kept=kept))
        folder = self.workspace.folder
        self.shelf, self.probe_shelf = Shelf(folder / "hidden_states"), Shelf(folder / "probe")
        self._subject, self._kept = subject, plan.kept
        self._with_bias = kinds_gaining_bias(subject.sites, plan.kept, job.config.reconstruction)

    def writing(self) -> AbstractContextManager[None]:
        return naming_what_is_full(self.workspace.folder)

    def open(self) -> None:
        self._cuts = plan_cuts(self._subject.sites, self._kept)
        pruned = empty_pruned_model(self._subject, self._kept, self._with_bias)
        renaming = Renaming(self._subject, self._kept)
        self._weights = _Weights(self.workspace.folder / CHECKPOINT, self._subject.model, pruned, renaming)
        self._weights.write_rest()

    def watched(self, layers: Iterable[Reconstruction]) -> Iterable[Reconstruction]:
        total = len(self._subject.layers)
        return progress(layers, "Cutting and writing", total=total, unit="layer", initial=self.shelf.settled)

    def put_down(self, number: int, layer: Reconstruction) -> None:
        replaced = replaced_parameters(self._subject.sites, layer.projections)
        self._weights.write_layer(number, self._cuts, replaced, layer.details)

    def details(self) -> dict[str, Any]:
        return self._weights.finish()

    def finish(self, plan: PruningPlan) -> PreTrainedModel:
        self.shelf.clear()
        model = self._subject.model
        loaded: PreTrainedModel = self._weights.model_class.from_pretrained(
            self._weights.folder,
            device_map=on_disk(model, model.device),
            dtype=model.dtype,
            attn_implementation=attention_implementations(model.config),
        )
        # The model needs the workspace as long as it exists, also after its pruner is deleted.
        loaded.__dict__["_workspace"] = self.workspace
        # The name of the model stays the one before, and not the path of the workspace.
        loaded.config._name_or_path = model.config._name_or_path
        return loaded.train(model.training)


class _Weights:
    """The weights of the pruned model, in one file per layer and one for all other weights."""

    def __init__(self, folder: Path, model: PreTrainedModel, pruned: PreTrainedModel, renaming: Renaming):
        self.folder = folder
        self.model_class: Any = type(pruned)
        self._model, self._pruned = model, pruned
        self._layers = [f"{name}." for name, _ in get_architecture(model.config).layers(model)]
        tied: Mapping[str, str] = getattr(pruned, "all_tied_weights_keys", {})
        # Names in the pruned model, with those in the dense model.
        self._names = {name: renaming.before(name) for name in pruned.state_dict() if name not in tied}

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
        """Write the kept part of a layer: replaced parameters, and slices of all others."""
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

    def _file(self, part: int) -> Path:
        return self.folder / f"model-{part + 1:05d}-of-{len(self._layers) + 1:05d}.safetensors"

    def _summary(self, part: int) -> Path:
        return self.folder.parent / f"about-{part}.json"
