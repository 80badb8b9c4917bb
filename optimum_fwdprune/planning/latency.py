"""Latencies of layers by their widths, as the cost that `target_speedup` allocates by instead of parameters."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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


# Costs are whole numbers of this fraction of a second.
PICOSECONDS = 1e12

# The smallest fraction of the dense model's time that a prediction leaves.
SMALLEST_REST = 1e-3

# The program that this package measures latencies in; a table of another program names it.
HERE = "transformers"


@dataclass(frozen=True)
class Latencies:
    """Seconds that a phase of a generation takes with a batch of one: of the dense model, and of the parts of a layer.

    Args:
        tokens (`int`): tokens of the prompt, or tokens in the KV cache before the one that is decoded.
        model_seconds (`float`): seconds of the dense model.
        layer_seconds (`float`): seconds of a layer without attention and MLP.
        site_seconds (`dict[str, list[tuple[int, float]]]`): by shape of a site (`shape_of`), pairs of kept units and
            of the seconds that the sublayer adds to its layer, in order of increasing units from `(0, 0.0)`.
    """

    tokens: int
    model_seconds: float
    layer_seconds: float
    site_seconds: dict[str, list[tuple[int, float]]]

    def seconds(self, site: Site) -> float:
        """Return the seconds that the site adds to its layer with its present number of units."""
        return float(self._at(shape_of(site), [site.num_units])[0])

    def _at(self, shape: str, units: Sequence[int]) -> np.ndarray:
        """Return the seconds of sites of a shape at numbers of units, between which they are interpolated."""
        measured, seconds = (np.array(values, dtype=float) for values in zip(*self.site_seconds[shape]))
        return np.interp(np.array(units, dtype=float), measured, seconds)

    def scaled(self, factor: float) -> Latencies:
        """Return the latencies with all seconds multiplied by a factor."""
        sites = {
            shape: [(units, factor * taken) for units, taken in pairs] for shape, pairs in self.site_seconds.items()
        }
        return replace(
            self,
            model_seconds=factor * self.model_seconds,
            layer_seconds=factor * self.layer_seconds,
            site_seconds=sites,
        )

    def __add__(self, other: Latencies) -> Latencies:
        sites = {}
        for shape, pairs in self.site_seconds.items():
            added = other._at(shape, [units for units, _ in pairs]).tolist()
            sites[shape] = [(units, own + more) for (units, own), more in zip(pairs, added)]
        return replace(
            self,
            model_seconds=self.model_seconds + other.model_seconds,
            layer_seconds=self.layer_seconds + other.layer_seconds,
            site_seconds=sites,
        )


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of a model in one or two phases of a generation.

    Args:
        phases (`dict[str, Latencies]`): latencies by phase, `"prefill"` or `"decode"`.
        measured_on (`dict`): the circumstances as JSON values: `"runtime"`, the program that ran the model;
            `"machine"`, with the device, its threads, the dtype and versions; and `"model"`, with the shapes of its
            sites; and `"multiple_of"`, the step of the MLP widths that were timed.
    """

    phases: dict[str, Latencies]
    measured_on: dict[str, Any]

    @property
    def is_of_this_program(self) -> bool:
        """Whether the latencies are those of models in transformers, and not in another program."""
        return self.measured_on["runtime"] == HERE

    def fits(self, measured_on: Mapping[str, Any]) -> str | None:
        """Return a clause on the first difference from the circumstances here; `None` where the table can be used.

        The machine of another program is not compared, since it is chosen by the user.
        """
        parts = measured_on if self.is_of_this_program else {"model": measured_on["model"]}
        own = {name: self.measured_on.get(name) for name in parts}
        return first_difference(own, json.loads(json.dumps(dict(parts))))

    def combined(self, shares: Mapping[str, float]) -> Latencies:
        """Return the latencies of a sum of phases.

        Args:
            shares (mapping of `str` to `float`): the shares of the dense model's time that phases take. A single phase
                keeps its seconds; the dense model takes a second in a sum.
        """
        if len(shares) == 1:
            return self.phases[next(iter(shares))]
        first, *others = (
            self.phases[phase].scaled(share / self.phases[phase].model_seconds) for phase, share in shares.items()
        )
        return sum(others, first)

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_text_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, measured_on: Mapping[str, Any]) -> LatencyTable:
        """Read a table.

        Raises:
            ValueError: where it was measured under other conditions (the message names the first difference), or is
                damaged.
        """
        try:
            table = cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no latency table: {type(error).__name__}: {error}.") from error
        if difference := table.fits(measured_on):
            raise ValueError(
                f"{path} was measured under other conditions: {difference}. Name another file, or delete it."
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"measured_on": self.measured_on, **{name: asdict(phase) for name, phase in self.phases.items()}}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> LatencyTable:
        """Build the table from its fields as JSON values."""
        phases = {}
        for name, values in document.items():
            if name == "measured_on":
                continue
            seconds = {
                shape: [(int(units), float(taken)) for units, taken in pairs]
                for shape, pairs in values["site_seconds"].items()
            }
            phases[name] = Latencies(
                int(values["tokens"]), float(values["model_seconds"]), float(values["layer_seconds"]), seconds
            )
        measured_on = dict(document["measured_on"])
        return cls(phases, {name: measured_on[name] for name in ("runtime", "machine", "model", "multiple_of")})


@dataclass(frozen=True)
class LatencyCost:
    """The time that sites take, in picoseconds (see [`Cost`]).

    Args:
        latencies (`Latencies`): the measured latencies of a phase, or of several together.
    """

    latencies: Latencies

    @cached_property
    def _picoseconds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        picoseconds_of = {}
        for shape, pairs in self.latencies.site_seconds.items():
            units, seconds = (np.array(values) for values in zip(*pairs))
            # Fewer units must never take longer. If a measurement shows that they do, it is noise, or the width is one
            # that kernels are slow for, so that removing units gains nothing.
            picoseconds_of[shape] = units, np.maximum.accumulate(seconds.astype(float)) * PICOSECONDS
        return picoseconds_of

    def _curve(self, site: Site) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of units of a site and their picoseconds. A site that lost units in earlier rounds may
        have a shape that was not timed, which counts as taking no time."""
        untimed = np.array([0, site.num_units]), np.zeros(2)
        return self._picoseconds.get(shape_of(site), untimed)

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        """Return the cost of the units of a site, as the time in addition to that of its smallest width: what is left
        of a sublayer at this width goes only with the sublayer (`whole`)."""
        widths, picoseconds = self._curve(site)
        narrowest = picoseconds[1] if widths[0] == 0 else picoseconds[0]
        costs = np.maximum(np.interp(units.numpy(), widths, picoseconds) - narrowest, 0)
        # An extra picosecond per unit: units that save no time would otherwise cost nothing, and are removed last now.
        return torch.from_numpy(costs).round().long() + units

    def total(self, site: Site) -> int:
        return int(self.of(site, torch.tensor([site.num_units])))

    def whole(self, gone: Collection[Site], sites: Collection[Site]) -> int:
        left = {site.key for site in sites} - {site.key for site in gone}
        layers = {site.layer for site in gone} - {layer for layer, _ in left}
        saved = len(layers) * round(self.latencies.layer_seconds * PICOSECONDS)
        for site in gone:
            widths, picoseconds = self._curve(site)
            saved += round(float(np.interp(site.num_units, widths, picoseconds))) + site.num_units
        return saved

    def speedup(self, saved: float) -> float:
        """Return the speed-up of a model that saves `saved` picoseconds."""
        model_seconds = self.latencies.model_seconds
        # Layers that are timed one by one may add up to more than the model.
        return model_seconds / max(model_seconds - saved / PICOSECONDS, SMALLEST_REST * model_seconds)

    def asked(self, amount: int, total: int) -> str:
        return f"A speed-up of {self.speedup(amount):.3g}"

    def most(self, amount: float, total: int) -> str:
        return f"speed-up is {int(self.speedup(amount) * 1e3) / 1e3:g}"


def speed_budget(latencies: Latencies, speedup: float) -> Budget:
    """Return a budget of the time that must be saved for this speed-up, as a lower limit."""
    saved = latencies.model_seconds * (1 - 1 / speedup) * PICOSECONDS
    return Budget(round(saved), at_least=True, cost=LatencyCost(latencies))


def at_measured_widths(sites: Sequence[Site], config: PruningConfig) -> PruningConfig:
    """Return the request with MLP widths rounded to those that a latency table holds."""
    return replace(config, multiple_of=coarse_multiple(sites, config))


def shape_of(site: Site, tokens: int | None = None) -> str:
    """Return a description of the site's shape; sites of one shape take the same time with equally many units.

    Args:
        site (`Site`): the site.
        tokens (`int`, *optional*): tokens of the prompt, or in the KV cache. Windows that are not shorter than these
            make no difference, and are left out of the description.
    """
    widths = "+".join(str(parameter.shape[1 - coupling.axis]) for coupling, parameter in _weights_of(site))
    shape = f"{site.kind}, units of {site.unit_width} in {site.num_groups} groups, linears of {widths}"
    is_limited = site.window is not None and (tokens is None or site.window < tokens)
    return f"{shape}, window of {site.window}" if is_limited else shape


def _weights_of(site: Site):
    return [(coupling, parameter) for coupling, parameter in site.owned_parameters() if parameter.dim() == 2]
