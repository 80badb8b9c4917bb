"""Latencies of layers by their widths, as the cost that `target_speedup` allocates by instead of parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..allocation.budgets import Budget
from ..allocation.constraints import coarse_multiple
from ..architectures import Site
from ..files import write_text_atomically
from ..request.config import PruningConfig
from ..runs.loggers import get_logger
from ..words import first_difference


logger = get_logger(__name__)


NANOSECONDS = 1e9


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a prefill of one prompt, for the whole dense model, and for layers by the number of units of a site.

    Args:
        model_seconds (`float`): seconds of the dense model.
        layer_seconds (`dict[str, list[tuple[int, float]]]`): by shape of a site (`shape_of`), pairs of kept units and
            seconds, in order of increasing units.
        measured_on (`dict`): machine, dtype, prompt length and the like, as JSON values.
    """

    model_seconds: float
    layer_seconds: dict[str, list[tuple[int, float]]]
    measured_on: dict[str, Any]

    def seconds(self, site: Site) -> float:
        """Return the seconds of the site's layer with its current number of units."""
        units, seconds = (np.array(values, dtype=float) for values in zip(*self.layer_seconds[shape_of(site)]))
        return float(np.interp(site.num_units, units, seconds))

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_text_atomically(path, json.dumps(vars(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, measured_on: dict[str, Any]) -> LatencyTable:
        """Read a table.

        Raises:
            ValueError: where it was measured under other conditions (the message names the first difference), or is
                damaged.
        """
        try:
            table = cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no latency table: {type(error).__name__}: {error}.") from error
        if difference := first_difference(table.measured_on, json.loads(json.dumps(measured_on))):
            raise ValueError(
                f"{path} was measured under other conditions: {difference}. Name another file, or delete it."
            )
        return table

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> LatencyTable:
        """Build the table from its fields as JSON values."""
        seconds = {
            shape: [(int(units), float(taken)) for units, taken in pairs]
            for shape, pairs in document["layer_seconds"].items()
        }
        return cls(float(document["model_seconds"]), seconds, dict(document["measured_on"]))


@dataclass(frozen=True)
class LatencyCost:
    """The time that sites take, in nanoseconds (see [`Cost`]).

    Args:
        table (`LatencyTable`): the measured latencies.
    """

    table: LatencyTable

    @cached_property
    def _nanoseconds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        nanoseconds_of = {}
        for shape, pairs in self.table.layer_seconds.items():
            units, seconds = (np.array(values) for values in zip(*pairs))
            # Fewer units must never take longer. If a measurement shows that they do, it is noise, or the width is one
            # that kernels are slow for, so that removing units gains nothing.
            falling = np.maximum.accumulate(seconds)
            nanoseconds_of[shape] = units, (falling - falling[0]) * NANOSECONDS
        return nanoseconds_of

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        widths, nanoseconds = self._nanoseconds[shape_of(site)]
        # An extra nanosecond per unit: units that save no time would otherwise cost nothing, and are removed last now.
        return torch.from_numpy(np.interp(units.numpy(), widths, nanoseconds)).round().long() + units

    def total(self, site: Site) -> int:
        return int(self.of(site, torch.tensor([site.num_units])))

    def whole(self, site: Site) -> int:
        return self.total(site)

    def speedup(self, saved: float) -> float:
        """Return the speed-up of a model that saves `saved` nanoseconds."""
        return self.table.model_seconds / (self.table.model_seconds - saved / NANOSECONDS)

    def asked(self, amount: int, total: int) -> str:
        return f"A speed-up of {self.speedup(amount):.3g}"

    def most(self, amount: float, total: int) -> str:
        return f"speed-up is {int(self.speedup(amount) * 1e3) / 1e3:g}"


def speed_budget(table: LatencyTable, speedup: float) -> Budget:
    """Return a budget of the time that must be saved for this speed-up, as a lower limit."""
    saved = table.model_seconds * (1 - 1 / speedup) * NANOSECONDS
    return Budget(round(saved), at_least=True, cost=LatencyCost(table))


def at_measured_widths(sites: Sequence[Site], config: PruningConfig) -> PruningConfig:
    """Return the request with MLP widths rounded to those that a latency table holds."""
    return replace(config, multiple_of=coarse_multiple(sites, config))


def shape_of(site: Site) -> str:
    """Return a description of the site's shape; sites of one shape take the same time with equally many units."""
    widths = "+".join(str(parameter.shape[1 - coupling.axis]) for coupling, parameter in _weights_of(site))
    return f"{site.kind}, units of {site.unit_width} in {site.num_groups} groups, linears of {widths}"


def _weights_of(site: Site):
    return [(coupling, parameter) for coupling, parameter in site.owned_parameters() if parameter.dim() == 2]
