"""The steps in which a site loses units, and how much they save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch

from ..architectures import (
    Site,
    SiteKey,
)
from ..request.config import PruningConfig
from .budgets import (
    PARAMETERS,
    Cost,
    ParameterCost,
)
from .widths import width_step


class Steps:
    """The steps in which a site loses units: the smallest cuts that its constraints allow, lowest scores first."""

    def __init__(
        self, site: Site, scores: torch.Tensor, config: PruningConfig, additive: bool, cost: Cost = PARAMETERS
    ):
        per_group = site.num_units // site.num_groups
        grouped = scores.double().view(site.num_groups, per_group)
        ranked = grouped.argsort(dim=1, stable=True)
        offsets = torch.arange(site.num_groups)[:, None] * per_group
        # A step removes one unit of every group: [step, group], flattened.
        self.order = (ranked + offsets).T.flatten()

        multiple = width_step(site, config)
        floor = -(-config.min_units_per_site // site.num_groups)
        # Kept units per group after every step, from the largest multiple below the present width down to the floor.
        largest = (per_group - 1) // multiple * multiple
        kept = torch.tensor(range(largest, floor - 1, -multiple), dtype=torch.int64)
        ends = (per_group - kept) * site.num_groups
        # Numbers of removed units, the sums of their scores and the saved cost, before the first step and after every
        # step.
        gone = torch.cat([ends.new_zeros(1), ends])
        sums = torch.cat([scores.new_zeros(1, dtype=torch.float64), scores.double()[self.order].cumsum(0)])
        costs = cost.of(site, site.num_units - gone)
        saved = costs[0] - costs
        # The curve is convex already where cost counts parameters: units of a site have equally many, and the lowest
        # scores are removed first.
        pooled = additive and not isinstance(cost, ParameterCost)
        places = convex(sums[gone], saved) if pooled else torch.arange(1, len(gone))
        self.costs = saved[places].diff(prepend=saved[:1])
        sizes = gone[places].diff(prepend=gone[:1])
        self.keys = sums[gone[places]].diff(prepend=sums[:1]) / (self.costs if additive else sizes)
        self.total = int(costs[0])
        self.site = site
        # All possible cuts; a step may combine several of them.
        self.gone, self.saved, self.lost = gone, saved, sums[gone]
        self.stops = torch.cat([places.new_zeros(1), places])

    def kept(self, cut: int) -> list[int]:
        return self.order[int(self.gone[cut]) :].sort().values.tolist()

    def removable(self) -> int:
        return int(self.saved[-1])


def convex(lost: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """Return the steps of the convex hull, between which the loss per saving never falls.

    A step before one with a smaller loss per saving is combined with it.

    Args:
        lost, saved (`Tensor[steps + 1]`): total loss and saving before the first step and after every step.
    """
    hull = [0]
    for place in range(1, len(lost)):
        while len(hull) > 1 and _slope(lost, saved, hull[-1], place) < _slope(lost, saved, hull[-2], hull[-1]):
            hull.pop()
        hull.append(place)
    return torch.tensor(hull[1:], dtype=torch.int64)


def _slope(lost: torch.Tensor, saved: torch.Tensor, start: int, end: int) -> float:
    return float((lost[end] - lost[start]) / (saved[end] - saved[start]))


def scores_alike(sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor]) -> dict[SiteKey, torch.Tensor]:
    """Return scores by which all layers lose the same numbers of units: the score of a unit becomes the mean over the
    units of its rank in all layers."""
    alike: dict[SiteKey, torch.Tensor] = {}
    for _, group in groupby(sorted(sites, key=_shape), key=_shape):
        of_shape = list(group)
        grouped = torch.stack([scores[site.key].double().view(site.num_groups, -1) for site in of_shape])
        ascending, ranked = grouped.sort(dim=2, stable=True)
        same = torch.zeros_like(grouped).scatter_(2, ranked, ascending.mean(dim=0).expand_as(grouped))
        alike |= {site.key: values.flatten() for site, values in zip(of_shape, same)}
    return alike


def _shape(site: Site) -> tuple[str, int, int]:
    return site.kind, site.num_units, site.num_groups
