"""Distributions over masks, whose keep rates a policy gradient learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...allocation.budgets import PARAMETERS, Cost
from ...architectures import Site, SiteKey
from ...request.choices import BudgetSharing, Scope
from ...request.config import PruningConfig
from ...runs.randomness import seeded_generator
from ..choices import Initialization
from .policy_gradient import RateBudget, project


# Added inside the root that preconditions the gradient, as in the paper's code, so that the gradient is finite at
# probabilities of 0 and 1.
ROOT_FLOOR = 1e-7

# Much smaller than the difference between the quantiles of two units of a site.
TIE_BREAK = 1e-7


@dataclass(frozen=True)
class MaskDraws:
    """Masks, and the deviations of the variables that they were drawn with.

    Args:
        masks (`Tensor[N, n]`, float64): 1 for units that are kept, and 0 for others, over all units of all sites.
        deviations (`Tensor[N, p]`, float64): deviations of the variables from their means, in standard deviations.
    """

    masks: torch.Tensor
    deviations: torch.Tensor


class Policy(Protocol):
    """A distribution over masks whose means, the keep rates `[p]` in float64, are learned within budgets."""

    budgets: Sequence[RateBudget]

    def draw(self, rates: torch.Tensor, count: int, seed: Sequence[int], antithetic: bool) -> MaskDraws:
        """Draw `count` masks, which `seed` determines; `antithetic` neighbours have opposite deviations."""

    def site_rates(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the mean keep rate of every site, `[sites]`."""

    def keep_probabilities(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the probabilities that a mask keeps the units, `[n]`."""

    def scores(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the final scores of the units, `[n]`: units with higher scores are kept."""


class UnitPolicy:
    """A keep probability per unit: the entries of a mask are independent Bernoulli variables (arXiv 2406.10576).

    Args:
        sites (sequence of `Site`): the sites whose units are masked.
        budgets (sequence of `RateBudget`): the budgets of the units.
    """

    def __init__(self, sites: Sequence[Site], budgets: Sequence[RateBudget]):
        self.budgets = budgets
        self._sizes = [site.num_units for site in sites]

    def draw(self, rates: torch.Tensor, count: int, seed: Sequence[int], antithetic: bool = False) -> MaskDraws:
        draws = count // 2 if antithetic else count
        uniform = torch.rand(draws, len(rates), generator=seeded_generator(*seed), dtype=torch.float64)
        if antithetic:
            uniform = torch.stack([uniform, 1 - uniform], dim=1).flatten(0, 1)
        masks = (uniform < rates).double()
        return MaskDraws(masks, standardized(masks, rates))

    def site_rates(self, rates: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.mean() for part in rates.split(self._sizes)])

    def keep_probabilities(self, rates: torch.Tensor) -> torch.Tensor:
        return rates

    def scores(self, rates: torch.Tensor) -> torch.Tensor:
        return rates


class Ratios:
    """The conversion of keep ratios of sites into scores of their units.

    Args:
        sites (sequence of `Site`): the sites.
        scores (mapping of site key to `Tensor[num_units]`): scores by the metric that ranks the units of a site.
        keep (`Callable`): returns the units that the request keeps, from scores of every unit by site key.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scores: Mapping[SiteKey, torch.Tensor],
        keep: Callable[[Mapping[SiteKey, torch.Tensor]], Mapping[SiteKey, list[int]]],
    ):
        self.sites = list(sites)
        self.sizes = torch.tensor([site.num_units for site in sites])
        # The share of a site's units that rank above the middle of a unit, which is kept where the ratio exceeds it.
        self._quantiles = torch.cat([_quantiles(site, scores[site.key]) for site in sites])
        self._keep = keep

    def scores(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the scores of all units for the ratios `[sites]`: `[n]`, units with higher scores are kept."""
        return rates.repeat_interleave(self.sizes) - self._quantiles

    def by_site(self, rates: torch.Tensor) -> dict[SiteKey, torch.Tensor]:
        """Return the scores by site."""
        return {site.key: part for site, part in zip(self.sites, self.scores(rates).split(self.sizes.tolist()))}

    def kept(self, rates: torch.Tensor) -> Mapping[SiteKey, list[int]]:
        """Return the units that the request keeps for the ratios."""
        return self._keep(self.by_site(rates))


class RatioPolicy:
    """A keep ratio per site, drawn around its mean; a metric ranks the units of a site.

    The drawn ratios are shifted so that they meet their budgets. A mask has the units that the request itself would
    keep for these ratios, with all its constraints, so that every mask is a possible result of the request.

    Args:
        ratios (`Ratios`): the conversion of ratios into units.
        budgets (sequence of `RateBudget`): the budgets of the sites.
        spread (`float`): standard deviation of the ratios before they are shifted.
    """

    def __init__(self, ratios: Ratios, budgets: Sequence[RateBudget], spread: float):
        self.budgets = budgets
        self._ratios = ratios
        self._spread = spread
        # The standard deviations of the ratios after they are shifted.
        self._deviations = torch.empty(len(ratios.sites), dtype=torch.float64)
        for budget in budgets:
            squares = budget.weights.square()
            self._deviations[budget.members] = spread * (1 - squares / squares.sum()).sqrt()

    def draw(self, rates: torch.Tensor, count: int, seed: Sequence[int], antithetic: bool = False) -> MaskDraws:
        draws = count // 2 if antithetic else count
        deviations = torch.randn(draws, len(rates), generator=seeded_generator(*seed), dtype=torch.float64)
        if antithetic:
            deviations = torch.stack([deviations, -deviations], dim=1).flatten(0, 1)
        for budget in self.budgets:
            own, weights = deviations[:, budget.members], budget.weights
            deviations[:, budget.members] = own - (own @ weights / (weights @ weights))[:, None] * weights
        return MaskDraws(
            torch.stack([self._mask(rates + self._spread * deviation) for deviation in deviations]), deviations
        )

    def site_rates(self, rates: torch.Tensor) -> torch.Tensor:
        return rates

    def keep_probabilities(self, rates: torch.Tensor) -> torch.Tensor:
        deviations = self._deviations.repeat_interleave(self._ratios.sizes).clamp_min(1e-12)
        return torch.special.ndtr(self.scores(rates) / deviations)

    def scores(self, rates: torch.Tensor) -> torch.Tensor:
        return self._ratios.scores(rates)

    def _mask(self, rates: torch.Tensor) -> torch.Tensor:
        kept = self._ratios.kept(rates)
        return torch.cat([site.unit_mask(kept[site.key]) for site in self._ratios.sites]).double()


@dataclass(frozen=True)
class Variables:
    """The variables of one site.

    Args:
        site (`Site`): the site.
        count (`int`): number of variables: the number of units, or 1 for a ratio.
        floor (`float`): smallest value of a variable.
    """

    site: Site
    count: int
    floor: float


def budgets_of(
    variables: Sequence[Variables],
    kept: Mapping[SiteKey, list[int]],
    config: PruningConfig,
    exact: bool,
    cost: Cost = PARAMETERS,
) -> list[RateBudget]:
    """Return the budgets that variables share; the limit of a budget is the cost of the units that the request keeps.

    Args:
        variables (sequence of `Variables`): the variables of every site.
        kept (mapping of site key to `list[int]`): the units that the request keeps for some scores.
        config (`PruningConfig`): the request; `scope` and `budget` determine which variables share a budget.
        exact (`bool`): whether budgets must be spent entirely.
        cost (`Cost`): what the budgets count; all units of a site cost the same.
    """
    pools: dict[tuple[str, int], list[tuple[Variables, int]]] = {}
    start = 0
    for site_variables in variables:
        site = site_variables.site
        kind = site.kind if config.budget == BudgetSharing.SEPARATE or config.has_budget_per_kind else ""
        layer = site.layer if config.resolved_scope == Scope.LAYER else -1
        pools.setdefault((kind, layer), []).append((site_variables, start))
        start += site_variables.count
    budgets = []
    for members in pools.values():
        # Costs are divided by that of the first variable. Variables of equal cost are thus counted, as in the paper.
        first = members[0][0]
        one = cost.total(first.site) / first.count
        places, weights, lowest = [], [], []
        for site_variables, start in members:
            count = site_variables.count
            places.append(torch.arange(start, start + count))
            weights.append(torch.full((count,), cost.total(site_variables.site) / count / one, dtype=torch.float64))
            lowest.append(torch.full((count,), site_variables.floor, dtype=torch.float64))
        sites = [site_variables.site for site_variables, _ in members]
        limit = sum(len(kept[site.key]) * cost.total(site) / site.num_units for site in sites) / one
        budgets.append(RateBudget(torch.cat(places), torch.cat(weights), limit, torch.cat(lowest), exact))
    return budgets


def even_rates(budgets: Sequence[RateBudget], count: int) -> torch.Tensor:
    """Return rates that divide every budget evenly among its variables, `[count]` float64."""
    rates = torch.empty(count, dtype=torch.float64)
    for budget in budgets:
        even = torch.full_like(budget.weights, budget.limit / float(budget.weights.sum()))
        rates[budget.members] = project(even, budget)
    return rates


def standardized(masks: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return `(m - s) / sqrt(s (1 - s))`, `[N, n]`: deviations of masks from their probabilities s `[n]`."""
    root = ((probabilities + ROOT_FLOOR) * (1 - probabilities + ROOT_FLOOR)).sqrt()
    return (masks - probabilities) / root


def _quantiles(site: Site, scores: torch.Tensor) -> torch.Tensor:
    """Return the quantiles of units within their groups: 0 ranks above all units, and 1 below all."""
    grouped = scores.double().view(site.num_groups, -1)
    ranks = grouped.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    quantiles = (ranks.double() + 0.5) / grouped.shape[1]
    # Units of equal rank in sites of equal size tie. The tie is broken in favour of units that are further above the
    # mean of their site, in standard deviations.
    outstanding = (grouped - grouped.mean()) / grouped.std(correction=0).clamp_min(1e-30)
    return (quantiles - TIE_BREAK * outstanding.tanh()).flatten()


def initial_probabilities(
    scores: Sequence[torch.Tensor], keep_rates: Sequence[float], how: str, seed: int
) -> torch.Tensor:
    """Turn the scores of every site into keep probabilities, `[n]` float64, whose mean is the site's keep rate.

    Args:
        scores (sequence of `Tensor[num_units]`): scores by the metric, site by site.
        keep_rates (sequence of `float`): mean probability of every site.
        how (`str`): `"sigmoid"` of the standardized scores, `"min_max"` scaled scores, `"constant"`, or `"random"`.
        seed (`int`): seed of `"random"`.
    """
    generator = torch.Generator().manual_seed(seed)
    probabilities = []
    for values, rate in zip(scores, keep_rates):
        values = values.double()
        if how == Initialization.SIGMOID:
            start = ((values - values.mean()) / values.std(correction=0).clamp_min(1e-30)).sigmoid()
        elif how == Initialization.MIN_MAX:
            start = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-30)
        elif how == Initialization.RANDOM:
            start = torch.rand(len(values), generator=generator, dtype=torch.float64)
        else:
            start = torch.zeros_like(values)
        probabilities.append(_shifted_to_mean(start, rate))
    return torch.cat(probabilities)


def _shifted_to_mean(values: torch.Tensor, mean: float) -> torch.Tensor:
    """Shift values and clamp them to [0, 1], so that the clamped values have the mean `mean`."""
    low, high = -1.0 - float(values.max()), 1.0 - float(values.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((values + middle).clamp(0, 1).mean()) < mean else (low, middle)
    return (values + high).clamp(0, 1)


def entropy(probabilities: torch.Tensor) -> float:
    """Return the mean entropy of the masks' entries, in bits; it is 0 if all probabilities are 0 or 1."""
    s = probabilities.clamp(1e-12, 1 - 1e-12)
    return float(-(s * s.log2() + (1 - s) * (1 - s).log2()).mean())
