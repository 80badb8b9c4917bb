"""What a search chooses among: keep ratios of sites, and layers or sublayers that go whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..allocation.budgets import Budget, OutOfReach
from ..allocation.constraints import fewest_units
from ..allocation.depth import DepthUnit, can_go, depth_units, open_units, removed_units, saved_by
from ..architectures import Site, SiteKey
from ..request.config import PruningConfig
from ..scoring.learning.policies import Ratios, Variables, budgets_of, even_rates
from ..scoring.learning.policy_gradient import RateBudget, project


KeepUnder = Callable[[Mapping[SiteKey, torch.Tensor], PruningConfig], dict[SiteKey, list[int]]]

# Starting points with different numbers of layers or sublayers, at most.
STARTS = 8


@dataclass(frozen=True)
class Choice:
    """A pruned model among which a search chooses.

    Args:
        rates (`Tensor[sites]`, float64): keep ratios of the sites whose widths are searched; 0 where a site is gone.
        gone (`tuple[int, ...]`): places of the layers or sublayers that are gone.
    """

    rates: torch.Tensor
    gone: tuple[int, ...] = ()


class Space:
    """All models that a search may choose among, which all meet the budget.

    Args:
        sites (sequence of `Site`): every site of the model.
        learned (sequence of `Site`): those whose widths are searched.
        scores (mapping of site key to `Tensor`): of the units of all sites, and of layers or sublayers.
        config (`PruningConfig`): the request, on the grid of the search.
        budget (`Budget`): what is removed in all.
        keep (`Callable`): returns the units that a request keeps, from scores and the request.

    Attributes:
        units (`list[DepthUnit]`): the layers or sublayers that may go; empty where the request names none.
        is_open (`bool`): whether the search decides which of them go. Otherwise `depth_sparsity` and their scores do.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        learned: Sequence[Site],
        scores: Mapping[SiteKey, torch.Tensor],
        config: PruningConfig,
        budget: Budget,
        keep: KeepUnder,
    ):
        self.every_site, self.sites = list(sites), list(learned)
        self.units: list[DepthUnit] = [] if config.depth_kind is None else open_units(sites, config)
        self.is_open = config.depth_is_open
        self.cost = budget.cost
        self.sizes = torch.tensor([site.num_units for site in learned], dtype=torch.float64)
        self._scores, self._config, self._budget, self._keep = scores, config, budget, keep
        self._parts: dict[tuple[int, ...], tuple[Ratios, list[RateBudget]]] = {}

    def request(self, gone: tuple[int, ...], config: PruningConfig | None = None) -> PruningConfig:
        """Return the request, or `config` where it is passed, for as many layers or sublayers as are `gone`."""
        config = self._config if config is None else config
        if not self.is_open:
            return config
        return replace(config, depth_sparsity=len(gone) / len(depth_units(self.every_site, str(config.depth_kind))))

    def scores(self, choice: Choice) -> dict[SiteKey, torch.Tensor]:
        """Return scores of all units, by which the request keeps what the choice keeps."""
        ratios, _ = self._part(choice.gone)
        ones = {site.key: torch.ones(site.num_units, dtype=torch.float32) for site in self.every_site}
        return ones | self._of_units(choice.gone) | ratios.by_site(choice.rates)

    def budgets(self, gone: tuple[int, ...]) -> list[RateBudget]:
        """Return the budgets of the keep ratios without what is gone.

        Raises:
            OutOfReach: where the sites that are left cannot meet them.
        """
        return self._part(gone)[1]

    def widths(self, choice: Choice) -> torch.Tensor:
        """Return the number of units that the request keeps of every site, `[sites]` float64."""
        kept = self._part(choice.gone)[0].kept(choice.rates)
        return torch.tensor([len(kept[site.key]) for site in self.sites], dtype=torch.float64)

    def rounded(self, choice: Choice) -> Choice:
        """Return the choice with the keep ratios that whole units allow."""
        return Choice(self.widths(choice) / self.sizes, choice.gone)

    def even(self, gone: tuple[int, ...]) -> Choice:
        """Return the choice in which every site that is left keeps the same share."""
        rates = torch.zeros(len(self.sites), dtype=torch.float64)
        budgets = self.budgets(gone)
        every_rate = even_rates(budgets, len(self.sites))
        for budget in budgets:
            rates[budget.members] = every_rate[budget.members]
        return Choice(rates, gone)

    def moved(self, choice: Choice, gone: tuple[int, ...]) -> Choice:
        """Return the choice nearest to `choice` in which other layers or sublayers are gone."""
        back = {site.key for place in set(choice.gone) - set(gone) for site in self.units[place].sites}
        rates = torch.zeros_like(choice.rates)
        start = choice.rates.clone()
        start[[place for place, site in enumerate(self.sites) if site.key in back]] = 1.0
        for budget in self.budgets(gone):
            rates[budget.members] = project(start[budget.members], budget)
        return Choice(rates, gone)

    def allows(self, gone: tuple[int, ...]) -> bool:
        """Whether the budget can be met without these layers or sublayers, and leaves a layer with attention."""
        units = [self.units[place] for place in gone]
        # A share of the parameters was rounded to whole ones.
        if saved_by(units, self.every_site, self.cost) > self._budget.amount + 1:
            return False
        try:
            return can_go(self.every_site, units) and self.budgets(gone) is not None
        except OutOfReach:
            return False

    def saves(self, place: int, choice: Choice) -> int:
        """Return what the removal of a layer or sublayer still saves in a choice. For one that is gone this is
        negative: what its return in full costs."""
        unit = self.units[place]
        others = [self.units[other] for other in choice.gone if other != place]
        # A sublayer saves more where the other sublayer of its layer is gone.
        saved = saved_by([*others, unit], self.every_site, self.cost) - saved_by(others, self.every_site, self.cost)
        if place in choice.gone:
            return -saved
        for site, rate in zip(self.sites, choice.rates.tolist()):
            if site.key in {own.key for own in unit.sites}:
                width = torch.tensor([round(rate * site.num_units)])
                saved -= self.cost.total(site) - int(self.cost.of(site, width))
        return saved

    def starts(self) -> list[tuple[int, ...]]:
        """Return which layers or sublayers may be gone at the start: the lowest scores, from as few as the budget can
        be met with to as many as it allows.

        Raises:
            OutOfReach: where the budget cannot be met.
        """
        if not self.units:
            return [()]
        places = {unit.key: place for place, unit in enumerate(self.units)}

        def lowest(number: int | None) -> tuple[int, ...]:
            removed = removed_units(self.every_site, self._scores, self._config, self._budget, number)
            return tuple(sorted(places[unit.key] for unit in removed))

        if not self.is_open:
            return [lowest(None)]
        kept = self._keep(self._scores, self._config)
        fewest = sum(not any(kept[site.key] for site in unit.sites) for unit in self.units)
        starts = [lowest(fewest)]
        while len(starts[-1]) < len(self.units):
            try:
                more = lowest(len(starts[-1]) + 1)
            except OutOfReach:
                break
            if not self.allows(more):
                break
            starts.append(more)
        spread = torch.linspace(0, len(starts) - 1, min(STARTS, len(starts))).round().long().tolist()
        return [starts[place] for place in spread]

    def _part(self, gone: tuple[int, ...]) -> tuple[Ratios, list[RateBudget]]:
        """Return the ratios of the sites, and their budgets, without what is gone."""
        if gone not in self._parts:
            request, values = self.request(gone), {**self._scores, **self._of_units(gone)}
            ratios = Ratios(self.sites, self._scores, lambda ordered: self._keep(values | dict(ordered), request))
            kept = self._keep(values, request)
            places = [place for place, site in enumerate(self.sites) if kept[site.key]]
            left = [self.sites[place] for place in places]
            variables = [Variables(site, 1, fewest_units(site, request) / site.num_units) for site in left]
            budgets = budgets_of(variables, kept, request, exact=True, cost=self.cost)
            here = torch.tensor(places, dtype=torch.int64)
            self._parts[gone] = ratios, [replace(budget, members=here[budget.members]) for budget in budgets]
        return self._parts[gone]

    def _of_units(self, gone: tuple[int, ...]) -> dict[SiteKey, torch.Tensor]:
        """Return scores of the layers or sublayers under which those that are gone go."""
        if not self.is_open:
            return {unit.key: self._scores[unit.key] for unit in self.units}
        return {unit.key: torch.tensor([float(place not in gone)]) for place, unit in enumerate(self.units)}
