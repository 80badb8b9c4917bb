"""The smallest model within a limit of quality: sizes are tried with replaced projections, without cutting a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..allocation.budgets import OutOfReach
from ..architectures import SiteKey
from ..data.calibration import Calibration
from ..forward.evidence import Evidence
from ..forward.gates import Projection, kept_projection
from ..forward.narrowing import narrowed
from ..forward.reference import Reference
from ..loading.subject import Subject
from ..reconstruction.reconstruct import reconstruct_by_layer
from ..request.config import PruningConfig
from ..runs.loggers import get_logger
from ..runs.resume import Stage


logger = get_logger(__name__)

# The search ends when the largest sparsity within the limit is known to this accuracy.
RESOLUTION = 0.01

# The sparsity that is tried first, and the largest one that is considered.
FIRST, LARGEST = 0.25, 0.99

# An interpolated sparsity keeps at least this share of the interval to both of its ends.
MARGIN = 0.15

# Returns the units that are kept with a sparsity.
KeptOf = Callable[[float], dict[SiteKey, list[int]]]


@dataclass(frozen=True)
class Limit:
    """A limit of quality.

    Args:
        field (`str`): `"max_perplexity_ratio"` or `"max_divergence"`.
        value (`float`): the largest allowed value.
    """

    field: str
    value: float

    @classmethod
    def of(cls, config: PruningConfig) -> Limit:
        """Return the limit of a request."""
        (field,) = config.limits_of_quality
        return cls(field, getattr(config, field))

    def measure(self, loss: float, dense_loss: float, divergence: float) -> float:
        """Return the quantity that is limited, from losses and a divergence in nats per token."""
        return divergence if self.field == "max_divergence" else math.exp(loss - dense_loss)

    def excess(self, measured: float) -> float:
        """Return how much worse than the dense model a model is, as a share of what is allowed; the limit is at 1."""
        worst = 0.0 if self.field == "max_divergence" else 1.0
        return (measured - worst) / (self.value - worst)


def largest_sparsity(check: Callable[[float], Any]) -> float:
    """Return the largest sparsity, a multiple of `RESOLUTION`, for which `check` does not raise `OutOfReach`."""
    low, high = 0, round(LARGEST / RESOLUTION)
    while low < high:
        middle = (low + high + 1) // 2
        try:
            check(middle * RESOLUTION)
            low = middle
        except OutOfReach:
            high = middle - 1
    return low * RESOLUTION


class QualityChoice:
    """Finds the largest sparsity whose model stays within a limit of quality on held-out windows.

    Args:
        subject (`Subject`): the dense model with all its sites, which is not changed.
        config (`PruningConfig`): the request, with a limit of quality.
        evidence (`Evidence`): the tokens to calibrate on, with statistics; the dense model's hidden states are shared
            by all sizes.
        held_out (`Calibration`): the windows to measure on.
        stage (`Stage`): where the measurements so far are stored.

    Attributes:
        tried (`dict[float, float]`): the measured quantity of every sparsity that was tried.
    """

    def __init__(
        self, subject: Subject, config: PruningConfig, evidence: Evidence, held_out: Calibration, stage: Stage
    ):
        self._subject, self._config, self._evidence, self._stage = subject, config, evidence, stage
        self._limit = Limit.of(config)
        self._reference = Reference(subject.model, [held_out], config.batch_size)
        self._kept: dict[float, dict[SiteKey, list[int]]] = {}
        self.tried: dict[float, float] = stage.load(lambda _tensors, numbers: dict(numbers["tried"])) or {}

    def run(self, kept_of: KeptOf, largest: float) -> float:
        """Return the sparsity.

        Args:
            kept_of (`Callable`): returns the units that the request keeps with a sparsity.
            largest (`float`): the largest sparsity that the constraints allow.

        Raises:
            ValueError: where no smaller model stays within the limit; the message names the nearest that does.
        """
        within, beyond = 0.0, largest + RESOLUTION
        guess = min(FIRST, within + (beyond - within) / 2)
        while beyond - within > RESOLUTION:
            measured = self._measured(guess, kept_of)
            logger.info("%s of sparsity %.4g: %.5g", self._limit.field, guess, measured)
            within, beyond = (guess, beyond) if measured <= self._limit.value else (within, guess)
            guess = self._between(within, beyond)
        if within == 0:
            raise ValueError(self._why_not())
        logger.warning(
            "%s=%.4g is met at sparsity=%.4g, where it is %.4g on %d held-out tokens.",
            self._limit.field,
            self._limit.value,
            within,
            self.tried[within],
            self._reference.dense.tokens,
        )
        return within

    def details(self, sparsity: float) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {
            "limit": dataclasses.asdict(self._limit),
            "measured": self.tried[sparsity],
            "sparsity": sparsity,
            "held_out_tokens": self._reference.dense.tokens,
            "tried": sorted(self.tried.items()),
        }

    def _measured(self, sparsity: float, kept_of: KeptOf) -> float:
        """Return the limited quantity of the model of a sparsity."""
        if sparsity in self.tried:
            return self.tried[sparsity]
        kept = kept_of(sparsity)
        # Whole layers and coarse widths lead to equal plans.
        same = next((other for other, units in self._kept.items() if units == kept), None)
        self._kept[sparsity] = kept
        self.tried[sparsity] = self.tried[same] if same in self.tried else self._measure(kept)
        self._stage.save(lambda: ({}, {"tried": sorted(self.tried.items())}))
        return self.tried[sparsity]

    @torch.no_grad()
    def _measure(self, kept: dict[SiteKey, list[int]]) -> float:
        projections: dict[SiteKey, Projection] = {}
        for layer in reconstruct_by_layer(self._subject, kept, self._config, self._evidence):
            projections |= layer.projections
        for site in self._subject.sites:
            if site.key not in projections and len(kept[site.key]) < site.num_units:
                projections[site.key] = kept_projection(site, kept[site.key])
        with narrowed(self._subject.sites, projections):
            likeness = self._reference.compare(self._subject.model)
        measured = self._limit.measure(likeness.loss, self._reference.dense.loss, likeness.divergence)
        # NaN is beyond every limit.
        return measured if math.isfinite(measured) else math.inf

    def _between(self, within: float, beyond: float) -> float:
        """Return the sparsity to try next: the quantity grows about exponentially, so that its logarithm is
        interpolated."""
        low, high = (self.tried.get(place) for place in (within, beyond))
        share = 0.5
        if low is not None and high is not None and 0 < self._limit.excess(low) < self._limit.excess(high) < math.inf:
            low, high = (math.log(self._limit.excess(value)) for value in (low, high))
            share = min(max(-low / (high - low), MARGIN), 1 - MARGIN)
        return within + share * (beyond - within)

    def _why_not(self) -> str:
        field, least = self._limit.field, min(self.tried)
        nearest = self.tried[least]
        # Rounded up to four digits, so that the suggestion can be met.
        digits = 3 - math.floor(math.log10(nearest)) if 0 < nearest < math.inf else 0
        shown = math.ceil(nearest * 10**digits) / 10**digits if math.isfinite(nearest) else nearest
        return (
            f"{field}={self._limit.value:g} cannot be met: a model of sparsity={least:.4g} has {nearest:.5g} on the "
            f"held-out windows. The nearest that can be met is {field}={shown:.5g}; more calibration text or another "
            f"reconstruction may allow less."
        )
