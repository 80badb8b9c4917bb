"""Distributions over masks, each with the few numbers that say how much is kept: what a policy gradient learns."""

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


# Inside the root that preconditions the gradient, as in the paper's code: finite at probabilities of 0 and 1.
ROOT_FLOOR = 1e-7

# Far below the distance between two places in a site.
TIE_BREAK = 1e-7


@dataclass(frozen=True)
class MaskDraws:
    """Masks, and how each came about.

    Args:
        masks (`Tensor[N, n]`, float64): of 0 and 1, all units of all sites.
        deviations (`Tensor[N, p]`, float64): of the variables drawn from their means, in standard deviations.
    """

    masks: torch.Tensor
    deviations: torch.Tensor


class Policy(Protocol):
    """A distribution over masks whose means, the keep rates `[p]` in float64, are learned within budgets."""

    budgets: Sequence[RateBudget]

    def draw(self, rates: torch.Tensor, count: int, seed: Sequence[int], antithetic: bool) -> MaskDraws:
        """Draw `count` masks; the same seed gives the same masks, and `antithetic` makes neighbours opposites."""

    def site_rates(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the mean keep rate of every site, `[sites]`."""

    def keep_probabilities(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the chance that a mask keeps each unit, `[n]`."""

    def scores(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the order in which units are kept in the end, `[n]`: higher is kept."""


class UnitPolicy:
    """A keep probability per unit: the entries of a mask are independent coins (arXiv 2406.10576).

    Args:
        sites (sequence of `Site`): whose units are drawn.
        budgets (sequence of `RateBudget`): over units.
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
    """Keep ratios of sites, as scores that order the units of all of them.

    Args:
        sites (sequence of `Site`): whose ratios they are.
        scores (mapping of site key to `Tensor[num_units]`): a metric's; the highest of a site stay.
        keep (`Callable`): scores of every unit in, by site key; out the units that the request keeps under them.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scores: Mapping[SiteKey, torch.Tensor],
        keep: Callable[[Mapping[SiteKey, torch.Tensor]], Mapping[SiteKey, list[int]]],
    ):
        self.sites = list(sites)
        self.sizes = torch.tensor([site.num_units for site in sites])
        # The share of its site that is better than the middle of a unit: kept where the ratio is above it.
        self._quantiles = torch.cat([_quantiles(site, scores[site.key]) for site in sites])
        self._keep = keep

    def scores(self, rates: torch.Tensor) -> torch.Tensor:
        """Return the order in which units are kept under the ratios `[sites]`: `[n]`, higher is kept."""
        return rates.repeat_interleave(self.sizes) - self._quantiles

    def by_site(self, rates: torch.Tensor) -> dict[SiteKey, torch.Tensor]:
        """Return the scores by site."""
        return {site.key: part for site, part in zip(self.sites, self.scores(rates).split(self.sizes.tolist()))}

    def kept(self, rates: torch.Tensor) -> Mapping[SiteKey, list[int]]:
        """Return the units that the request keeps under the ratios."""
        return self._keep(self.by_site(rates))


class RatioPolicy:
    """A keep ratio per site, drawn around its mean; which units stay within a site is settled by a metric.

    The draws of a budget are shifted so that they keep to it, and become the units that the request itself would keep
    under such ratios, with all its constraints. So every mask is a model that the request could end with.

    Args:
        ratios (`Ratios`): what the ratios of sites come to.
        budgets (sequence of `RateBudget`): over sites.
        spread (`float`): standard deviation of a ratio.
    """

    def __init__(self, ratios: Ratios, budgets: Sequence[RateBudget], spread: float):
        self.budgets = budgets
        self._ratios = ratios
        self._spread = spread
        # Of a ratio that was shifted into its budget.
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
        site (`Site`): whose units or ratio they are.
        count (`int`): one for every unit, or one alone.
        floor (`float`): the least that each of them may be.
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
    """Return one budget for all variables that may trade with each other, of the size of what the request keeps.

    Args:
        variables (sequence of `Variables`): of every site.
        kept (mapping of site key to `list[int]`): what the request keeps under some scores.
        config (`PruningConfig`): `scope` and `budget` say what trades with what.
        exact (`bool`): budgets must be met, not only kept to.
        cost (`Cost`): what they are counted in; a unit takes its share of all that its site costs.
    """
    pools: dict[tuple[str, int], list[tuple[Variables, int]]] = {}
    start = 0
    for of_site in variables:
        site = of_site.site
        kind = site.kind if config.budget == BudgetSharing.SEPARATE or config.has_budget_per_kind else ""
        layer = site.layer if config.resolved_scope == Scope.LAYER else -1
        pools.setdefault((kind, layer), []).append((of_site, start))
        start += of_site.count
    budgets = []
    for members in pools.values():
        # In units of the first variable's: counts where all are of one size, as in the paper.
        first = members[0][0]
        one = cost.total(first.site) / first.count
        places, weights, lowest = [], [], []
        for of_site, start in members:
            count = of_site.count
            places.append(torch.arange(start, start + count))
            weights.append(torch.full((count,), cost.total(of_site.site) / count / one, dtype=torch.float64))
            lowest.append(torch.full((count,), of_site.floor, dtype=torch.float64))
        sites = [of_site.site for of_site, _ in members]
        limit = sum(len(kept[site.key]) * cost.total(site) / site.num_units for site in sites) / one
        budgets.append(RateBudget(torch.cat(places), torch.cat(weights), limit, torch.cat(lowest), exact))
    return budgets


def even_rates(budgets: Sequence[RateBudget], count: int) -> torch.Tensor:
    """Return every variable's share of its budget, `[count]` float64."""
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
    """Place every unit among those of its group: 0 is better than all, 1 worse than all."""
    grouped = scores.double().view(site.num_groups, -1)
    ranks = grouped.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    quantiles = (ranks.double() + 0.5) / grouped.shape[1]
    # Units of the same place in sites of the same size tie; those that stand out least in their site go first then.
    outstanding = (grouped - grouped.mean()) / grouped.std(correction=0).clamp_min(1e-30)
    return (quantiles - TIE_BREAK * outstanding.tanh()).flatten()


def initial_probabilities(
    scores: Sequence[torch.Tensor], keep_rates: Sequence[float], how: str, seed: int
) -> torch.Tensor:
    """Turn the scores of every site into keep probabilities, `[n]` float64, whose mean is the site's keep rate.

    Args:
        scores (sequence of `Tensor[num_units]`): a metric's, site by site.
        keep_rates (sequence of `float`): mean probability asked for.
        how (`str`): `"sigmoid"` of the standardised scores, `"min_max"` scaled scores, `"constant"`, or `"random"`.
        seed (`int`): of `"random"`.
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
    """Shift and clamp to [0, 1] so that the clamped values have the mean asked for."""
    low, high = -1.0 - float(values.max()), 1.0 - float(values.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((values + middle).clamp(0, 1).mean()) < mean else (low, middle)
    return (values + high).clamp(0, 1)


def entropy(probabilities: torch.Tensor) -> float:
    """Return the mean entropy of the masks' entries, in bits: 0 once every unit is decided."""
    s = probabilities.clamp(1e-12, 1 - 1e-12)
    return float(-(s * s.log2() + (1 - s) * (1 - s).log2()).mean())
