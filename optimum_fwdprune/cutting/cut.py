"""Carrying out a plan: the loop that reconstructs, places and verifies layer by layer, in memory or on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..allocation.fitting import check_fits
from ..allocation.job import Job
from ..allocation.plan import PruningPlan
from ..forward.evidence import Evidence
from ..loading.state import evaluating
from ..loading.subject import Subject
from ..reconstruction.reconstruct import reconstruct_by_layer, warn_of_unchanged
from ..reconstruction.reconstruction import Reconstruction
from ..runs.progress import one_step
from ..runs.shelves import Shelf
from .probe import Probe
from .verification import logits, relative_difference


@dataclass(frozen=True)
class Cut:
    """A pruned model.

    Args:
        model (`PreTrainedModel`): the model.
        plan (`PruningPlan`): the units that it keeps of the previous model, with figures of the reconstruction.
        difference (`float`): difference between logits of the masked and the pruned model, as a fraction of their
            scale.
    """

    model: PreTrainedModel
    plan: PruningPlan
    difference: float

    def after(self, earlier: Cut) -> Cut:
        """Return the combination of an earlier cut and this one."""
        return Cut(self.model, earlier.plan.followed_by(self.plan), max(earlier.difference, self.difference))


class Place(Protocol):
    """The place of the layers of a pruned model, which builds the model from them.

    Attributes:
        shelf (`Shelf`): storage for hidden states of the calibration tokens, and the progress of an interrupted run.
        probe_shelf (`Shelf`): the same for the tokens of the verification.
        done (sequence of `Reconstruction`): the reconstructions of the first layers by an interrupted run.
    """

    shelf: Shelf
    probe_shelf: Shelf
    done: Sequence[Reconstruction]

    def writing(self) -> AbstractContextManager[None]:
        """Within the context, make errors of a full disk name the folder that layers are written to."""

    def open(self) -> None:
        """Prepare for the first layer."""

    def watched(self, layers: Iterable[Reconstruction]) -> Iterable[Reconstruction]:
        """Show the progress of the layers, if it is not shown elsewhere."""

    def put_down(self, number: int, layer: Reconstruction) -> None:
        """Store the reconstructed layer `number`, whose dense weights are in memory."""

    def details(self) -> dict[str, Any]:
        """Return the details of the reconstruction of all layers."""

    def finish(self, plan: PruningPlan) -> PreTrainedModel:
        """Return the pruned model."""


@torch.no_grad()
def cut(subject: Subject, plan: PruningPlan, evidence: Evidence, job: Job, place: Place) -> Cut:
    """Reconstruct, place and verify one layer after the other, and return the pruned model.

    Args:
        subject (`Subject`): the dense model with all its sites. It is unchanged until the last layer is reconstructed.
        plan (`PruningPlan`): the units that the sites keep.
        evidence (`Evidence`): tokens and statistics for the reconstruction.
        job (`Job`): the reconstruction of the request, and the clock.
        place (`Place`): the place of the layers.

    Raises:
        ValueError: where the plan does not fit the model.
        RuntimeError: where the outputs of the pruned model differ from those of the masked model.
    """
    clock = job.clock
    check_fits(plan, subject)
    with place.writing(), evaluating(subject.model):
        with clock.stage("surgery"):
            place.open()
        with clock.stage("verify"):
            probe = Probe(subject, plan, evidence.calibration, place.probe_shelf)
        first = place.shelf.settled
        layers = reconstruct_by_layer(subject, plan.kept, job.config, evidence, place.shelf, place.done)
        for number, layer in enumerate(clock.each_in("reconstruct", place.watched(layers)), first):
            with clock.stage("surgery"):
                place.put_down(number, layer)
            with clock.stage("verify"):
                probe.pass_layer(number, layer.projections)
        with clock.stage("verify"), one_step("Running the masked model"):
            expected, rounding = probe.expected()
    details = place.details()
    warn_of_unchanged(subject.sites, plan.kept, details)
    if details:
        plan = dataclasses.replace(plan, metadata={**plan.metadata, "reconstructed": details})
    with clock.stage("surgery"):
        pruned = place.finish(plan)
    with clock.stage("verify"), one_step("Verifying the pruned model"):
        difference = relative_difference(expected, logits(pruned, probe.tokens), rounding)
    return Cut(pruned, plan, difference)
