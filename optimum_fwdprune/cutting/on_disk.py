"""Cutting a model on disk: layers are written one at a time, and read again in every forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel

from ..allocation.job import Job
from ..allocation.plan import PruningPlan
from ..data.calibration import Calibration
from ..files import naming_what_is_full
from ..loading.subject import Subject
from ..reconstruction.bias import kinds_gaining_bias
from ..reconstruction.reconstruction import Reconstruction
from ..runs.progress import progress
from ..runs.shelves import Shelf
from .layered import LayeredCheckpoint, Workspace
from .renaming import Renaming
from .surgery import (
    empty_pruned_model,
    plan_cuts,
    replaced_parameters,
)


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
        self._weights = LayeredCheckpoint(self.workspace, self._subject.model, pruned, renaming)
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
        return self._weights.load()
