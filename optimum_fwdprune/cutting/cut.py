"""A plan carried out: reconstruction, surgery, and the check that the pruned model computes what it should."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..allocation.plan import PruningPlan
from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..forward.statistics import SiteStatistics
from ..loading.dispatching import PlacementError
from ..loading.state import evaluating
from ..reconstruction.independent import Grams
from ..reconstruction.reconstruct import reconstruct
from ..request.config import PruningConfig
from ..runs.progress import one_step
from ..runs.resume import Resume
from .surgery import prune_model
from .verification import (
    logits,
    masked_logits,
    probe_batch,
    relative_difference,
    rounding_of,
)


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


def cut(
    model: PreTrainedModel,
    sites: list[Site],
    plan: PruningPlan,
    config: PruningConfig,
    calibration: Calibration | None,
    statistics: Mapping[SiteKey, SiteStatistics],
    grams: Grams,
    inplace: bool,
    seconds: dict[str, float],
    resume: Resume | None = None,
    finished: Callable[[Cut], None] = lambda _cut: None,
) -> Cut:
    """Reconstruct the projections, cut the model, and check it on a probe batch.

    Args:
        model (`PreTrainedModel`): the model to cut; it is consumed where `inplace`.
        sites (`list[Site]`): all its sites.
        plan (`PruningPlan`): what they keep.
        config (`PruningConfig`): the reconstruction.
        calibration (`Calibration`, *optional*): the tokens that it needs.
        statistics (mapping of site key to `SiteStatistics`): moments, where they were gathered before.
        grams (`Grams`): for independent least squares, where they were gathered before.
        inplace (`bool`): consume the model.
        seconds (`dict[str, float]`): time by stage, added to.
        resume (`Resume`, *optional*): where long stages keep their state.
        finished (`Callable`, *optional*): called with the pruned model as soon as it is whole, before it is checked.

    Raises:
        ValueError: where the plan does not fit the model.
        RuntimeError: where the pruned model does not compute what the masked one computes.
    """
    with timed(seconds, "reconstruct"), evaluating(model):
        found = reconstruct(model, sites, plan.kept, config, calibration, statistics, grams, resume)
        if found.details:
            plan = dataclasses.replace(plan, metadata={**plan.metadata, "reconstructed": found.details})
    with timed(seconds, "verify"), one_step("Running the masked model"):
        probe = probe_batch(model, calibration)
        expected = masked_logits(model, sites, plan, found.projections, probe)
        rounding = rounding_of(model, sites, plan, found.projections, probe, expected)
    with timed(seconds, "surgery"):
        try:
            pruned = prune_model(model, sites, plan, found.projections, inplace)
        except PlacementError as error:
            finished(Cut(error.model, plan, math.nan))
            raise
        finished(Cut(pruned, plan, math.nan))
    with timed(seconds, "verify"), one_step("Verifying the pruned model"):
        difference = relative_difference(expected, logits(pruned, probe), rounding)
    return Cut(pruned, plan, difference)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that the block takes to `seconds[stage]`, until the accelerator has done its work."""
    start = time.perf_counter()
    yield
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
