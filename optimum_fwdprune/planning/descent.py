"""Keep ratios moved along what sweeps over the sites measure, with the state that a search resumes from."""

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
from ..forward.gates import Projection
from ..runs import ranks
from ..runs.progress import progress
from ..runs.resume import (
    Stage,
    State,
)
from ..scoring.learning.policies import Ratios
from ..scoring.learning.policy_gradient import RateBudget, project
from .divergence import Divergence
from .levels import Levels


# How far keep ratios move in a step at first; halved when no step helps, down to half a level.
FIRST_STEP, LAST_STEP = 0.2, 0.5 / LEVELS


# Parts of a step that are tried.
PARTS = (1.0, 0.5, 0.25)


# As a share of the usual slope: what sites count as whose narrowing costs nothing, or helps.
SMALLEST_SLOPE = 1e-3


@dataclass
class SearchState:
    """All that a search needs to go on.

    Args:
        rates (`Tensor[sites]`, float64): keep ratios of the best so far; empty before the first.
        step (`float`): how far they move next; below `LAST_STEP` once nothing helps any more.
        windows (`float`): passes of a window through all layers so far.
        losses (`list[float]`): divergence of the start and after every sweep.
        path (`list[Tensor[sites]]`): the keep ratios that these belong to.
        even (`float`): divergence of the even share.
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
            # Nothing is drawn, so all is decided at every sweep.
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
    """Moves keep ratios of sites along what sweeps find."""

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
        # Those of the model that is settled.
        self._projections: dict[SiteKey, Projection] = {}
        self._allowed = math.inf

    def start(self, state: SearchState, starts: Sequence[torch.Tensor]) -> None:
        """Settle the best of the keep ratios to start from, the even share first."""
        starting = [self._widths(rates) for rates in starts]
        losses = self._divergences(starting)
        best = losses.index(min(losses))
        state.even = losses[0]
        state.add(starting[best] / self._sizes, self._settle(starting[best]))
        state.windows += (2 + len(starts)) * self._num_windows

    def run(self, state: SearchState, price: float, allowed: int, stage: Stage) -> None:
        """Sweep and move, at `price` for each window, until the windows allowed are used up or nothing helps."""
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
        """The best of a few moves along the slopes of all sites, and its divergence."""
        slopes = self._slopes(state)
        direction = torch.zeros_like(slopes)
        for budget in self._budgets:
            own = slopes[budget.members]
            if not (own > 0).any():
                # Nothing here tells one site from another.
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
        """What narrowing each site by a step adds to the divergence, by what it saves, `[sites]` float64."""
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
        """The width nearest to one step below, or above where there is none below."""
        widths = [width_here for width_here in self._levels.widths(site) if width_here != width]
        below = [width_here for width_here in widths if width_here < width]
        wanted = width - step * site.num_units if below else width + step * site.num_units
        return min(below or widths, key=lambda width_here: abs(width_here - wanted))

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
        """The divergence under each of several widths of all sites."""
        divergences = torch.zeros(len(candidates), dtype=torch.float64)
        for place in progress(ranks.own(range(len(candidates))), "Comparing widths", unit="candidate"):
            divergences[place] = self._divergence.of(self._projections_of(candidates[place]))
        return ranks.summed(divergences).tolist()

    def _settle(self, widths: torch.Tensor) -> float:
        self._projections = self._projections_of(widths)
        return self._divergence.settle(self._projections)
