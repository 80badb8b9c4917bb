"""Feature Map Sensitivity: magnitude, gradient and activation in one score (MINI-LLM, arXiv 2407.11681)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from ...architectures import Coupling, Site, SiteKey
from ...forward.statistics import SiteStatistics
from ...runs.progress import progress
from ..choices import Aggregation
from .perturbation import (
    Noise,
    Perturbation,
    UnitPerturbation,
    WeightPerturbation,
)
from .zeroth_order import Draws


# Returns gradients of perturbed tensor `index`: the estimate, then estimates that leave out a part of the draws. The
# caller may overwrite them.
Gradient = Callable[[int], Iterable[torch.Tensor]]


class Sensitivity(Protocol):
    """A score as a function of a gradient."""

    perturbation: Perturbation

    def of(self, gradient: Gradient) -> dict[SiteKey, torch.Tensor]:
        """Return the score of every unit, `[estimates, num_units]`, for every estimate of the gradient."""


class WeightSensitivity:
    """S = Σ |W[i, j] · ĝ[i, j]| · ‖X_j‖₂ over all weights of a unit: source rows, biases and projection columns.

    A bias is the weight of a feature that is always 1, so its ‖X‖₂ is the root of the number of tokens.

    Args:
        sites (`list[Site]`): the sites.
        statistics (mapping of site key to `SiteStatistics`): moments and source norms.
        noise (`Noise`): the noise of the perturbation that estimates ĝ.
        aggregation (`str`): `"sum"`, `"mean"` (over the owned weights) or `"l2"` (root of the sum of squares).
    """

    def __init__(
        self, sites: Sequence[Site], statistics: Mapping[SiteKey, SiteStatistics], noise: Noise, aggregation: str
    ):
        self.perturbation = WeightPerturbation(sites, noise)
        self._sites = sites
        self._statistics = statistics
        self._aggregation = aggregation

    def of(self, gradient: Gradient) -> dict[SiteKey, torch.Tensor]:
        scores: dict[SiteKey, torch.Tensor] = {}
        index = 0
        for site in progress(self._sites, "Summing up draws", unit="site"):
            total: Any = 0.0
            for coupling, parameter in site.owned_weights():
                parts = [self._owned(site, coupling, parameter.detach(), estimate) for estimate in gradient(index)]
                total = total + torch.stack(parts)
                index += 1
            if self._aggregation == Aggregation.L2:
                total = total.sqrt()
            elif self._aggregation == Aggregation.MEAN:
                total = total / site.unit_parameters
            scores[site.key] = total
        return scores

    def _owned(self, site: Site, coupling: Coupling, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        # Products are computed in place, since a linear may be large and has several estimates of its gradient.
        products = gradient.mul_(parameter).mul_(self._norms(site, coupling, parameter, gradient))
        products = products.square_() if self._aggregation == Aggregation.L2 else products.abs_()
        return site.sum_owned(coupling, parameter, products)

    def _norms(self, site: Site, coupling: Coupling, parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        statistics = self._statistics[site.key]
        if parameter.dim() == 1:
            return like.new_tensor(statistics.count).sqrt()
        norms = statistics.norm if coupling.axis == 1 else statistics.source_norms[coupling.name]
        return norms.to(like)


class UnitSensitivity:
    """S = |∂L/∂gate| · ‖X‖₂ of a unit, with ‖X‖₂ over all its features.

    The gate's gradient is Σ W·∂L/∂W over the unit's projection columns, so that this is the product of the same three
    factors. It needs an estimate of one number per unit instead of thousands.

    Args:
        sites (`list[Site]`): the sites.
        statistics (mapping of site key to `SiteStatistics`): moments.
        noise (`Noise`): the noise of the perturbation that estimates the gradient.
    """

    def __init__(self, sites: Sequence[Site], statistics: Mapping[SiteKey, SiteStatistics], noise: Noise):
        self.perturbation = UnitPerturbation(sites, noise)
        self._norms = torch.cat([site.sum_features(statistics[site.key].norm.square()).sqrt().cpu() for site in sites])

    def of(self, gradient: Gradient) -> dict[SiteKey, torch.Tensor]:
        return self.perturbation.split(torch.stack([estimate.cpu().abs() for estimate in gradient(0)]) * self._norms)


def estimated(perturbation: Perturbation, draws: Draws, groups: int) -> Gradient:
    """Return the gradient that the draws estimate, and `groups` more estimates that leave out a part of the draws."""
    groups = min(groups, len(draws.indices))

    def gradient(index: int) -> Iterator[torch.Tensor]:
        sums = draws.gradient_sums(perturbation, index, groups)
        count = len(draws.indices)
        total = sums.sum(0)
        yield total / count
        if groups > 1:
            for group in range(groups):
                # Group g holds the draws g, g + groups, ...
                yield torch.sub(total, sums[group]).div_(count - len(range(group, count, groups)))

    return gradient


def jackknife(estimates: torch.Tensor) -> torch.Tensor:
    """Return the standard error of `estimates[0]`, `[num_units]`, from the estimates that leave a part out.

    This is the delete-a-group jackknife (Kott 2001). It measures the scatter of the draws, and not the bias of |noise|
    away from 0.
    """
    left_out = estimates[1:]
    groups = len(left_out)
    if groups < 2:
        return torch.full_like(estimates[0], torch.nan)
    return ((groups - 1) / groups * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
