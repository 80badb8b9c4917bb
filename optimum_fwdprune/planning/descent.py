"""The descent of a search: it moves keep ratios along slopes that sweeps over the sites measure. Its state is kept, so
that an interrupted search can resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..allocation.budgets import Cost
from ..allocation.constraints import (
    LEVELS,
)
from ..architectures import Site, SiteKey
from ..forward.divergence import Divergence
from ..forward.gates import Projection
from ..runs import ranks
from ..runs.progress import progress
from ..runs.resume import (
    Stage,
    State,
)
from ..scoring.learning.policies import Ratios
from ..scoring.learning.policy_gradient import RateBudget, project
from .levels import Levels


# How far keep ratios move in the first step. The step is halved when no move helps, down to half a level.
FIRST_STEP, LAST_STEP = 0.2, 0.5 / LEVELS


# The fractions of a step that are tried.
PARTS = (1.0, 0.5, 0.25)


# The slope of sites whose narrowing costs nothing, or helps, as a fraction of the median slope.
SMALLEST_SLOPE = 1e-3


@dataclass
class SearchState:
    """The state of a search, from which it can resume.

    Args:
        rates (`Tensor[sites]`, float64): the best keep ratios so far; empty before the search has started.
        step (`float`): how far they move in the next step; below `LAST_STEP` once no move helps any more.
        windows (`float`): passes of a window through all layers so far.
        losses (`list[float]`): divergence at the start and after every sweep.
        path (`list[Tensor[sites]]`): the keep ratios that belong to `losses`.
        even (`float`): divergence where every site keeps the same share.
    """

    rates: torch.Tensor
    step: float
    windows: float = 0.0
    losses: list[float] = field(default_factory=list)
    path: list[torch.Tensor] = field(default_factory=list)
    even: float = math.nan

    @property
    def sweeps(self) -> int:
        return max(0, len(self.losses) - 1)

    def add(self, rates: torch.Tensor, loss: float) -> None:
        self.rates = rates
        self.losses.append(loss)
        self.path.append(rates)

    def history(self, sites: Sequence[Site], every_site: Sequence[Site]) -> dict[str, torch.Tensor]:
        rates = torch.stack(self.path)
        sizes = torch.tensor([site.num_parameters for site in sites], dtype=torch.float64)
        removed = (1 - rates) @ sizes / sum(site.num_parameters for site in every_site)
        history = {
            "loss": torch.tensor(self.losses, dtype=torch.float32),
            # The search draws no masks, so that every unit is decided at every sweep.
            "entropy": torch.zeros(len(rates), dtype=torch.float32),
            "expected_sparsity": removed.float(),
        }
        for site, values in zip(sites, rates.float().unbind(1)):
            history[f"keep_rate.{site.key}"] = values
        return history

    def state(self) -> State:
        numbers = {"step": self.step, "windows": self.windows, "losses": self.losses, "even": self.even}
        return {"path": torch.stack(self.path)}, numbers

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> SearchState:
        rates = list(tensors["path"])
        return cls(rates[-1], numbers["step"], numbers["windows"], numbers["losses"], rates, numbers["even"])


class Descent:
    """Moves the keep ratios of sites along the slopes that sweeps measure."""

    def __init__(
        self,
        ratios: Ratios,
        budgets: Sequence[RateBudget],
        levels: Levels,
        divergence: Divergence,
        cost: Cost,
        num_windows: int,
    ):
        self._ratios = ratios
        self._budgets = budgets
        self._levels = levels
        self._divergence = divergence
        self._cost = cost
        self._num_windows = num_windows
        self._sizes = ratios.sizes.double()
        # The projections of the settled model.
        self._projections: dict[SiteKey, Projection] = {}
        self._allowed = math.inf

    def start(self, state: SearchState, starts: Sequence[torch.Tensor]) -> None:
        """Settle the best of several starting points; the first of them must be the even share."""
        starting = [self._widths(rates) for rates in starts]
        losses = self._divergences(starting)
        best = losses.index(min(losses))
        state.even = losses[0]
        state.add(starting[best] / self._sizes, self._settle(starting[best]))
        state.windows += (2 + len(starts)) * self._num_windows

    def run(self, state: SearchState, price: float, allowed: int, stage: Stage) -> None:
        """Sweep and move until `allowed` windows are used up or no move helps.

        Args:
            state (`SearchState`): state of the search, which is updated.
            price (`float`): passes through all layers that a sweep and its move take, per window.
            allowed (`int`): largest number of passes of a window through all layers.
            stage (`Stage`): stage that the state is saved to.
        """
        price *= self._num_windows
        self._allowed = allowed
        if not self._projections:
            self._settle((state.rates * self._sizes).round())
        stage.save(state.state)
        while state.step >= LAST_STEP and state.windows + price <= allowed:
            rates, loss = self._move(state)
            state.windows += price
            if loss < state.losses[-1]:
                state.add(rates, self._settle((rates * self._sizes).round()))
            else:
                state.add(state.rates, state.losses[-1])
                state.step /= 2
            stage.save(state.state)

    def _move(self, state: SearchState) -> tuple[torch.Tensor, float]:
        """Return the best of a few moves along the slopes of all sites, and its divergence."""
        slopes = self._slopes(state)
        direction = torch.zeros_like(slopes)
        for budget in self._budgets:
            own = slopes[budget.members]
            if not (own > 0).any():
                # Without a positive slope there is no difference to move along.
                continue
            logarithms = own.clamp_min(SMALLEST_SLOPE * float(own[own > 0].median())).log()
            mean = (budget.weights @ logarithms) / budget.weights.sum()
            direction[budget.members] = (logarithms - mean).clamp(-1, 1)
        candidates: dict[tuple[int, ...], torch.Tensor] = {}
        for part in PARTS:
            moved = state.rates + part * state.step * direction
            for budget in self._budgets:
                moved[budget.members] = project(moved[budget.members], budget)
            widths = self._widths(moved)
            if not torch.equal(widths, (state.rates * self._sizes).round()):
                candidates[tuple(widths.tolist())] = widths
        if not candidates:
            return state.rates, math.inf
        losses = self._divergences(list(candidates.values()))
        best = losses.index(min(losses))
        return list(candidates.values())[best] / self._sizes, losses[best]

    def _slopes(self, state: SearchState) -> torch.Tensor:
        """Return the divergence that narrowing each site by a step adds, per unit of saved cost, `[sites]`."""
        slopes = torch.zeros(len(state.rates), dtype=torch.float64)
        own = ranks.own(list(enumerate(self._ratios.sites)))
        used = min(1.0, state.windows / self._allowed)
        stage = f"Searching, sweep {state.sweeps + 1}, {used:.0%} of search_windows used"
        for place, site in progress(own, stage, unit="site"):
            width = round(float(state.rates[place] * site.num_units))
            other = self._neighbour(site, width, state.step)
            changed = dict(self._projections)
            changed.pop(site.key, None)
            projection = self._levels.projection(site, other)
            changed |= {} if projection is None else {site.key: projection}
            loss = self._divergence.of(changed, first=site.layer)
            before, after = self._cost.of(site, torch.tensor([width, other])).tolist()
            slopes[place] = (loss - state.losses[-1]) / (before - after)
        return ranks.summed(slopes)

    def _neighbour(self, site: Site, width: int, step: float) -> int:
        """Return the width closest to one step below `width`, or above where no width is below."""
        others = [level for level in self._levels.widths(site) if level != width]
        below = [level for level in others if level < width]
        wanted = width - step * site.num_units if below else width + step * site.num_units
        return min(below or others, key=lambda level: abs(level - wanted))

    def _widths(self, rates: torch.Tensor) -> torch.Tensor:
        kept = self._ratios.kept(rates)
        return torch.tensor([len(kept[site.key]) for site in self._ratios.sites], dtype=torch.float64)

    def _projections_of(self, widths: torch.Tensor) -> dict[SiteKey, Projection]:
        projections = {}
        for site, width in zip(self._ratios.sites, widths.long().tolist()):
            projection = self._levels.projection(site, width)
            if projection is not None:
                projections[site.key] = projection
        return projections

    def _divergences(self, candidates: Sequence[torch.Tensor]) -> list[float]:
        """Return the divergence for every candidate, which has a width for every site."""
        divergences = torch.zeros(len(candidates), dtype=torch.float64)
        for place in progress(ranks.own(range(len(candidates))), "Comparing widths", unit="candidate"):
            divergences[place] = self._divergence.of(self._projections_of(candidates[place]))
        return ranks.summed(divergences).tolist()

    def _settle(self, widths: torch.Tensor) -> float:
        self._projections = self._projections_of(widths)
        return self._divergence.settle(self._projections)
