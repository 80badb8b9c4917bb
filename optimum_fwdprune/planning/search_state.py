"""The state of a search, which is kept so that an interrupted search can resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runs.resume import State
from .space import Choice, Space


@dataclass
class SearchState:
    """The state of the descent from one starting point.

    Args:
        step (`float`): how far they move in the next step; below `LAST_STEP` once no move helps any more.
        windows (`float`): passes of a window through all layers so far.
        losses (`list[float]`): divergence at the start and after every sweep.
        path (`list[Tensor[sites]]`): the keep ratios that belong to `losses`.
        depths (`list[tuple[int, ...]]`): the places of the layers or sublayers that are gone, likewise.
        even (`float`): divergence where every site keeps the same share.
    """

    step: float
    windows: float = 0.0
    losses: list[float] = field(default_factory=list)
    path: list[torch.Tensor] = field(default_factory=list)
    depths: list[tuple[int, ...]] = field(default_factory=list)
    even: float = math.nan

    @property
    def rates(self) -> torch.Tensor:
        """The best keep ratios so far."""
        return self.path[-1]

    @property
    def gone(self) -> tuple[int, ...]:
        """The layers or sublayers that are gone in the best model so far."""
        return self.depths[-1]

    @property
    def choice(self) -> Choice:
        """The best model so far."""
        return Choice(self.rates, self.gone)

    @property
    def sweeps(self) -> int:
        return max(0, len(self.losses) - 1)

    def add(self, choice: Choice, loss: float) -> None:
        self.losses.append(loss)
        self.path.append(choice.rates)
        self.depths.append(choice.gone)

    def history(self, space: Space) -> dict[str, torch.Tensor]:
        rates, sites = torch.stack(self.path), space.sites
        sizes = torch.tensor([site.num_parameters for site in sites], dtype=torch.float64)
        searched = {site.key for site in sites}
        others = [
            sum(site.num_parameters for place in gone for site in space.units[place].sites if site.key not in searched)
            for gone in self.depths
        ]
        total = sum(site.num_parameters for site in space.every_site)
        removed = ((1 - rates) @ sizes + torch.tensor(others, dtype=torch.float64)) / total
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
        numbers: dict[str, Any] = {
            "step": self.step,
            "windows": self.windows,
            "losses": self.losses,
            "even": self.even,
        }
        numbers["depths"] = self.depths
        return {"path": torch.stack(self.path)}, numbers

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> SearchState:
        rates = list(tensors["path"])
        depths = [tuple(gone) for gone in numbers["depths"]]
        return cls(numbers["step"], numbers["windows"], numbers["losses"], rates, depths, numbers["even"])


def state_of(states: Sequence[SearchState]) -> State:
    """Return the states of all starting points as one state to save."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for place, state in enumerate(states):
        of_place, numbers[str(place)] = state.state()
        tensors |= {f"{place}.{name}": value for name, value in of_place.items()}
    return tensors, numbers


def states_of(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> list[SearchState]:
    """Return the states that `state_of` made one of."""
    return [
        SearchState.of(
            {name.removeprefix(f"{place}."): value for name, value in tensors.items() if name.startswith(f"{place}.")},
            of_place,
        )
        for place, of_place in sorted(numbers.items())
    ]
