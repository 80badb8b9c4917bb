"""Learning which layers or sublayers are kept: a distribution over masks that close sites as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...allocation.depth import DepthUnit, number_removed
from ...architectures import Site, SiteKey
from ..methods.scoring import ScoringInputs
from .policies import MaskDraws, UnitPolicy, even_rates, initial_probabilities
from .policy_gradient import FLOOR, RateBudget


class DepthPolicy:
    """A keep probability per layer or sublayer, whose sites are open or closed as a whole (arXiv 2406.10576v1).

    Args:
        units (sequence of `DepthUnit`): the layers or sublayers that are drawn.
        sites (sequence of `Site`): their sites, in the order of the masks.
        budget (`RateBudget`): the budget over layers or sublayers.
    """

    def __init__(self, units: Sequence[DepthUnit], sites: Sequence[Site], budget: RateBudget):
        self.budgets = [budget]
        owners = {site.key: place for place, unit in enumerate(units) for site in unit.sites}
        self._of_site = torch.tensor([owners[site.key] for site in sites])
        self._sizes = torch.tensor([site.num_units for site in sites])
        self._coins = UnitPolicy([], self.budgets)

    def draw(self, rates: torch.Tensor, count: int, seed: Sequence[int], antithetic: bool = False) -> MaskDraws:
        draws = self._coins.draw(rates, count, seed, antithetic)
        return MaskDraws(self._spread(draws.masks), draws.deviations)

    def site_rates(self, rates: torch.Tensor) -> torch.Tensor:
        return rates[self._of_site]

    def keep_probabilities(self, rates: torch.Tensor) -> torch.Tensor:
        return self._spread(rates)

    def scores(self, rates: torch.Tensor) -> torch.Tensor:
        return rates

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Give all units of a site the value of its layer or sublayer: `[..., units]` to `[..., n]`."""
        return values[..., self._of_site.repeat_interleave(self._sizes)]


def depth_policy(
    inputs: ScoringInputs, units: Sequence[DepthUnit], sites: Sequence[Site], metric: Mapping[SiteKey, torch.Tensor]
) -> tuple[DepthPolicy, torch.Tensor]:
    """Return the policy that layers or sublayers are drawn from, and the initial keep rates `[units]`.

    Args:
        inputs (`ScoringInputs`): of a request for layers or sublayers.
        units (sequence of `DepthUnit`): those that the request may remove.
        sites (sequence of `Site`): their sites, in the order of the masks.
        metric (mapping of site key to `Tensor[1]`): the scores that the probabilities start from.
    """
    config = inputs.config
    if config.has_target:
        kept = inputs.keep(metric)
        weights = [float(sum(site.all_parameters for site in unit.sites)) for unit in units]
        limit = sum(weight for unit, weight in zip(units, weights) if any(kept[site.key] for site in unit.sites))
    else:
        # The sparsity is a share of the layers or sublayers, whatever their sizes.
        weights = [1.0] * len(units)
        limit = len(units) - number_removed(inputs.sites[:], config)
    floors = torch.full((len(units),), FLOOR, dtype=torch.float64)
    members = torch.arange(len(units))
    budget = RateBudget(members, torch.tensor(weights, dtype=torch.float64), limit, floors)
    mean = float(even_rates([budget], len(units))[0])
    scores = [torch.cat([metric[unit.key] for unit in units])]
    return DepthPolicy(units, sites, budget), initial_probabilities(scores, [mean], config.initialization, config.seed)
