"""A plan carried out: the one loop that settles, puts down and checks layer after layer, in memory or on disk."""

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
        plan (`PruningPlan`): what it kept of the one before, with what its reconstruction settled.
        difference (`float`): between logits of the masked and of the pruned model, as a fraction of their scale.
    """

    model: PreTrainedModel
    plan: PruningPlan
    difference: float

    def after(self, earlier: Cut) -> Cut:
        """Return what both cuts come to."""
        return Cut(self.model, earlier.plan.followed_by(self.plan), max(earlier.difference, self.difference))


class Place(Protocol):
    """Where the layers of a pruned model are put down, and how they become a model.

    Attributes:
        shelf (`Shelf`): where hidden states of the calibration tokens wait, and how far an interrupted run came.
        probe_shelf (`Shelf`): the same for the tokens that are compared on.
        done (sequence of `Reconstruction`): of the first layers, where an earlier run has settled them.
    """

    shelf: Shelf
    probe_shelf: Shelf
    done: Sequence[Reconstruction]

    def writing(self) -> AbstractContextManager[None]:
        """Let errors in the block name what is full, where layers are written."""

    def open(self) -> None:
        """Prepare for the first layer."""

    def watched(self, layers: Iterable[Reconstruction]) -> Iterable[Reconstruction]:
        """Show how far the layers are, where they show that nowhere else."""

    def put_down(self, number: int, layer: Reconstruction) -> None:
        """Take what is settled of layer `number`, whose dense weights are in memory."""

    def details(self) -> dict[str, Any]:
        """Return the details of the reconstruction of all layers."""

    def finish(self, plan: PruningPlan) -> PreTrainedModel:
        """Return the pruned model."""


@torch.no_grad()
def cut(subject: Subject, plan: PruningPlan, evidence: Evidence, job: Job, place: Place) -> Cut:
    """Settle, put down and check one layer after the other, and return the pruned model.

    Args:
        subject (`Subject`): the dense model with all its sites. Until the last layer is settled it is whole.
        plan (`PruningPlan`): what they keep.
        evidence (`Evidence`): what the reconstruction needs.
        job (`Job`): the reconstruction that is asked for, and the clock.
        place (`Place`): where layers are put down.

    Raises:
        ValueError: where the plan does not fit the model.
        RuntimeError: where the pruned model does not compute what the masked one computes.
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
