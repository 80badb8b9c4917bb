"""The descent of a search: it moves keep ratios along slopes that sweeps over the sites measure. Its state is kept, so
that an interrupted search can resume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..allocation.constraints import (
    LEVELS,
)
from ..architectures import Site, SiteKey
from ..forward.divergence import Divergence
from ..forward.gates import Projection
from ..runs import ranks
from ..runs.progress import progress
from ..scoring.learning.policy_gradient import project
from .levels import Levels
from .search_state import SearchState
from .space import Choice, Space


# How far keep ratios move in the first step. The step is halved when no move helps, down to half a level.
FIRST_STEP, LAST_STEP = 0.2, 0.5 / LEVELS


# The fractions of a step that are tried.
PARTS = (1.0, 0.5, 0.25)


# The passes of every window that a start takes besides those of the choices: of the dense model, and of the choice
# that is descended from.
WINDOWS_OF_START = 2


# How many exchanges of layers or sublayers a sweep tries.
EXCHANGES = 4


# The slope of sites whose narrowing costs nothing, or helps, as a fraction of the median slope.
SMALLEST_SLOPE = 1e-3


class Descent:
    """Moves the keep ratios of sites along the slopes that sweeps measure, and exchanges layers or sublayers.

    Args:
        space (`Space`): the models to choose among.
        levels (`Levels`): the sites at several widths.
        divergence (`Divergence`): compares models with the dense one; it must look at every site.
        num_windows (`int`): windows that models are compared on.
    """

    def __init__(self, space: Space, levels: Levels, divergence: Divergence, num_windows: int):
        self._space = space
        self._levels = levels
        self._divergence = divergence
        self._num_windows = num_windows
        # The projections of the settled model.
        self._projections: dict[SiteKey, Projection] = {}
        self._allowed = math.inf

    def start(self, choices: Sequence[Choice]) -> list[SearchState]:
        """Return the starting points of a search: the best choice with as few layers or sublayers gone as in the first
        one, and the best of the other choices. The first choice must be the even share."""
        starting = [self._space.rounded(choice) for choice in choices]
        losses = self._divergences(starting)
        few = [place for place, choice in enumerate(starting) if len(choice.gone) == len(starting[0].gone)]
        groups = [few, [place for place in range(len(starting)) if place not in few]]
        states = list[SearchState]()
        for group in filter(None, groups):
            best = min(group, key=losses.__getitem__)
            # The dense model and all choices were passed; what is started from is passed again.
            windows = (WINDOWS_OF_START + len(starting)) * self._num_windows if not states else 2 * self._num_windows
            state = SearchState(FIRST_STEP, windows, even=losses[0])
            state.add(starting[best], losses[best])
            states.append(state)
        return states

    def run(self, state: SearchState, price: float, allowed: float, save: Callable[[], None]) -> None:
        """Sweep and move until `allowed` windows are used up or no move helps.

        Args:
            state (`SearchState`): state of the search, which is updated.
            price (`float`): passes through all layers that a sweep and its moves take, per window.
            allowed (`float`): largest number of passes of a window through all layers.
            save (`Callable`): saves the state.
        """
        price *= self._num_windows
        self._allowed = allowed
        is_settled = False
        while state.step >= LAST_STEP and state.windows + price <= allowed:
            if not is_settled:
                self._settle(state.choice)
                is_settled = True
            choice, loss = self._move(state)
            state.windows += price
            if loss < state.losses[-1]:
                state.add(choice, self._settle(choice))
            else:
                state.add(state.choice, state.losses[-1])
                state.step /= 2
            save()

    def _move(self, state: SearchState) -> tuple[Choice, float]:
        """Return the best of a few moves along the slopes of all sites and a few exchanges, and its divergence."""
        space, budgets = self._space, self._space.budgets(state.gone)
        slopes = self._slopes(state)
        direction = torch.zeros_like(slopes)
        for budget in budgets:
            own = slopes[budget.members]
            if not (own > 0).any():
                # Without a positive slope there is no difference to move along.
                continue
            logarithms = own.clamp_min(SMALLEST_SLOPE * float(own[own > 0].median())).log()
            mean = (budget.weights @ logarithms) / budget.weights.sum()
            direction[budget.members] = (logarithms - mean).clamp(-1, 1)
        moved = []
        for part in PARTS:
            rates = state.rates + part * state.step * direction
            for budget in budgets:
                rates[budget.members] = project(rates[budget.members], budget)
            moved.append(Choice(rates, state.gone))
        moved += [space.moved(state.choice, gone) for gone in self._exchanges(state, slopes)]
        candidates: dict[tuple[Any, ...], Choice] = {}
        for choice in map(space.rounded, moved):
            if choice.gone != state.gone or not torch.equal(choice.rates, state.rates):
                candidates[choice.gone, *choice.rates.tolist()] = choice
        if not candidates:
            return state.choice, math.inf
        losses = self._divergences(list(candidates.values()))
        best = losses.index(min(losses))
        return list(candidates.values())[best], losses[best]

    def _slopes(self, state: SearchState) -> torch.Tensor:
        """Return the divergence that narrowing each site by a step adds, per unit of saved cost, `[sites]`; 0 where a
        site is gone."""
        slopes = torch.zeros(len(state.rates), dtype=torch.float64)
        own = ranks.own([(place, site) for place, site in enumerate(self._space.sites) if state.rates[place] > 0])
        for place, site in progress(own, self._named("sites", state), unit="site"):
            width = round(float(state.rates[place] * site.num_units))
            other = self._neighbour(site, width, state.step)
            changed = dict(self._projections)
            changed.pop(site.key, None)
            projection = self._levels.projection(site, other)
            changed |= {} if projection is None else {site.key: projection}
            loss = self._divergence.of(changed, first=site.layer)
            before, after = self._space.cost.of(site, torch.tensor([width, other])).tolist()
            slopes[place] = (loss - state.losses[-1]) / (before - after)
        return ranks.summed(slopes)

    def _named(self, what: str, state: SearchState) -> str:
        used = min(1.0, state.windows / self._allowed)
        return f"Searching {what}, sweep {state.sweeps + 1}, {used:.0%} of search_windows used"

    def _neighbour(self, site: Site, width: int, step: float) -> int:
        """Return the width closest to one step below `width`, or above where no width is below."""
        others = [level for level in self._levels.widths(site) if level != width]
        below = [level for level in others if level < width]
        wanted = width - step * site.num_units if below else width + step * site.num_units
        return min(below or others, key=lambda level: abs(level - wanted))

    def _exchanges(self, state: SearchState, slopes: torch.Tensor) -> list[tuple[int, ...]]:
        """Return the most promising sets of layers or sublayers to be gone instead: one more, one less, or another.

        Each is measured alone in the settled model. What its removal saves, or its return costs, is valued at the
        median slope of the sites.
        """
        space = self._space
        # After a sweep that changed nothing the measurements would be the same again.
        if not space.is_open or (state.sweeps and state.losses[-1] == state.losses[-2]):
            return []
        rising = slopes[slopes > 0]
        price = float(rising.median()) if len(rising) else 0.0
        changes = self._changes_of_units(state, price).tolist()
        back = sorted(state.gone, key=changes.__getitem__)
        away = sorted((place for place in range(len(space.units)) if place not in state.gone), key=changes.__getitem__)
        flips = [*((place,) for place in (*back, *away)), *itertools.product(back[:EXCHANGES], away[:EXCHANGES])]
        flips.sort(key=lambda places: sum(changes[place] for place in places))
        sets = (tuple(sorted(set(state.gone) ^ set(places))) for places in flips)
        return list(itertools.islice((gone for gone in sets if space.allows(gone)), EXCHANGES))

    def _changes_of_units(self, state: SearchState, price: float) -> torch.Tensor:
        """Return what the removal of each layer or sublayer, or its return, adds to the divergence, `[units]`."""
        space = self._space
        changes = torch.zeros(len(space.units), dtype=torch.float64)
        own = ranks.own(list(enumerate(space.units)))
        for place, unit in progress(own, self._named("depth", state), unit="candidate"):
            of_unit = {site.key for site in unit.sites}
            changed = {key: value for key, value in self._projections.items() if key not in of_unit}
            changed |= {} if place in state.gone else self._closed([place])
            loss = self._divergence.of(changed, first=unit.key.layer)
            changes[place] = loss - state.losses[-1] - price * space.saves(place, state.choice)
        return ranks.summed(changes)

    def _closed(self, gone: Iterable[int]) -> dict[SiteKey, Projection]:
        sites = [site for place in gone for site in self._space.units[place].sites]
        return {site.key: self._levels.without(site) for site in sites}

    def _projections_of(self, choice: Choice) -> dict[SiteKey, Projection]:
        projections = self._closed(choice.gone)
        widths = (choice.rates * self._space.sizes).round()
        for site, width in zip(self._space.sites, widths.long().tolist()):
            projection = self._levels.projection(site, width) if width else None
            if projection is not None:
                projections[site.key] = projection
        return projections

    def _divergences(self, candidates: Sequence[Choice]) -> list[float]:
        """Return the divergence for every candidate."""
        divergences = torch.zeros(len(candidates), dtype=torch.float64)
        for place in progress(ranks.own(range(len(candidates))), "Comparing widths", unit="candidate"):
            divergences[place] = self._divergence.of(self._projections_of(candidates[place]))
        return ranks.summed(divergences).tolist()

    def _settle(self, choice: Choice) -> float:
        self._projections = self._projections_of(choice)
        return self._divergence.settle(self._projections)
