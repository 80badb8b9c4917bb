"""Cutting a model in memory, or on the devices to which accelerate dispatched it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedModel

from ..allocation.job import Job
from ..allocation.plan import PruningPlan
from ..architectures import SiteKey
from ..data.calibration import Calibration
from ..forward.gates import Projection
from ..loading.dispatching import PlacementError
from ..loading.subject import Subject
from ..reconstruction.reconstruction import Reconstruction
from ..request.choices import ReconstructionKind
from ..runs.resume import Resume, Stage
from ..runs.shelves import Shelf
from .cut import Cut
from .surgery import prune_model


class InMemory:
    """A [`~optimum_fwdprune.cutting.cut.Place`] that stores new parameters in addition to the dense weights, and cuts
    the dense weights after the last layer is reconstructed.

    A layer that was cut in place could not be restored if a later layer fails, because its activations contain NaN or
    because the run is interrupted. New parameters are therefore stored in the memory of the host until surgery moves
    them, tensor by tensor. An accelerator holds the dense model and the new parameters of one layer.

    Args:
        subject (`Subject`): the dense model with all its sites.
        plan (`PruningPlan`): the units that the sites keep.
        job (`Job`): the request, and the folder for states of reconstructed layers.
        calibration (`Calibration`, *optional*): the tokens of the reconstruction.
        inplace (`bool`, defaults to `True`): whether the dense model may be consumed.
        finished (`Callable`, *optional*): is called with the pruned model as soon as it is complete, before it is
            verified.
    """

    def __init__(
        self,
        subject: Subject,
        plan: PruningPlan,
        job: Job,
        calibration: Calibration | None,
        inplace: bool = True,
        finished: Callable[[Cut], None] = lambda _cut: None,
    ):
        self._subject, self._plan, self._calibration = subject, plan, calibration
        self._job, self._inplace, self._finished = job, inplace, finished
        self.shelf, self.probe_shelf = Shelf(), Shelf()
        self.done: Sequence[Reconstruction] = ()
        self._stages: list[Stage] = []
        self._projections: dict[SiteKey, Projection] = {}
        self._details: dict[str, Any] = {}

    def writing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def open(self) -> None:
        kept, subject = self._plan.kept, self._subject
        # A round without reconstruction or without removed units has no state.
        loses = any(len(kept[site.key]) < site.num_units for site in subject.sites)
        has_state = self._job.config.reconstruction != ReconstructionKind.NONE and loses
        resume = self._job.resume if has_state else Resume()
        # The plan identifies the round, since the model of a round may differ between devices by rounding.
        digest = hashlib.sha256(json.dumps(sorted(kept.items())).encode()).hexdigest()[:16]
        self._stages = [
            resume.stage(f"reconstruction-{number}", self._calibration, kept=digest)
            for number in range(len(subject.layers))
        ]
        states = itertools.takewhile(bool, (stage.load(Reconstruction.of) for stage in self._stages))
        self.done = [state for state in states if state is not None]

    def watched(self, layers: Iterable[Reconstruction]) -> Iterable[Reconstruction]:
        return layers

    def put_down(self, number: int, layer: Reconstruction) -> None:
        self._projections |= layer.on_host().projections
        self._details |= layer.details
        if number >= len(self.done):
            self._stages[number].save(layer.state)

    def details(self) -> dict[str, Any]:
        return self._details

    def finish(self, plan: PruningPlan) -> PreTrainedModel:
        try:
            pruned = prune_model(self._subject, plan, self._projections, self._inplace)
        except PlacementError as error:
            self._finished(Cut(error.model, plan, math.nan))
            raise
        self._finished(Cut(pruned, plan, math.nan))
        return pruned
