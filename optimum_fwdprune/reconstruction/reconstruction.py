"""The results of reconstruction: new parameters of projections, and the quality of their fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import torch

from ..architectures import Site, SiteKey
from ..forward.gates import Projection
from ..runs.devices import compute_device, on_host
from ..runs.resume import State


@dataclass(frozen=True)
class Reconstruction:
    """New parameters of projections, and the quality of their fit.

    Args:
        projections (`dict[SiteKey, Projection]`): new parameters. The columns of other sites are not changed.
        details (`dict[str, dict]`): figures of least squares, by `"<layer>.<kind>"`: the ridge, and the mean squared
            error on held-out tokens before and after refitting the columns, as JSON values.
    """

    projections: dict[SiteKey, Projection] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def state(self) -> State:
        """Return the reconstruction as tensors and JSON values."""
        tensors = {}
        for key, projection in self.projections.items():
            tensors[f"{key}.weight"] = projection.weight.detach()
            if projection.bias is not None:
                tensors[f"{key}.bias"] = projection.bias.detach()
            tensors |= {f"{key}.source.{name}": weight for name, weight in projection.sources.items()}
        kept = [[*key, projection.kept] for key, projection in self.projections.items()]
        return tensors, {"kept": kept, "details": self.details}

    def placed_like(self, sites: Iterable[Site]) -> Reconstruction:
        """Return the reconstruction with every projection on the device of its site."""
        placed = {}
        for site in sites:
            if site.key in self.projections:
                move = methodcaller("to", compute_device(site.output))
                placed[site.key] = self.projections[site.key].mapped(move)
        return Reconstruction(placed, self.details)

    def on_host(self) -> Reconstruction:
        """Return the reconstruction with every projection in the memory of the host."""
        return Reconstruction(
            {key: projection.mapped(on_host) for key, projection in self.projections.items()}, self.details
        )

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> Reconstruction:
        """Return the reconstruction from the tensors and values that [`state`] returned."""
        projections = {}
        for layer, kind, units in numbers["kept"]:
            key = SiteKey(layer, kind)
            sources = {
                name.removeprefix(f"{key}.source."): weight
                for name, weight in tensors.items()
                if name.startswith(f"{key}.source.")
            }
            weight, bias = tensors[f"{key}.weight"], tensors.get(f"{key}.bias")
            projections[key] = Projection(units, weight, bias, sources)
        return cls(projections, numbers["details"])
