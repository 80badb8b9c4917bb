"""Statistics of the inputs of output projections, which are collected in forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..architectures import Site, SiteKey
from ..runs.devices import compute_device


MOMENTS, GRAM, SOURCE_NORMS = "moments", "gram", "source_norms"
KINDS_OF_STATISTICS = (MOMENTS, GRAM, SOURCE_NORMS)


@dataclass
class SiteStatistics:
    """Statistics of one projection's input features over the calibration tokens.

    Experts have one feature each: the router weight times the L2 norm of the expert's output, and 0 at tokens that are
    not routed to it.

    Args:
        count (`int`): number of tokens.
        mean (`Tensor[in_features]`, float32): mean of every feature.
        variance (`Tensor[in_features]`, float32): population variance of every feature.
        gram (`Tensor[in_features, in_features]`, float32, *optional*): sum over tokens of x xᵀ.
        source_norms (`dict[str, Tensor[in_features]]`): ‖X_j‖₂ of the inputs of source linears, by the name of the
            linear, float32.
        routed (`Tensor[num_units]`, float32, *optional*): the number of tokens that are routed to every expert.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    gram: torch.Tensor | None = None
    source_norms: dict[str, torch.Tensor] = field(default_factory=dict)
    routed: torch.Tensor | None = None

    def with_more(self, other: SiteStatistics) -> SiteStatistics:
        """Return the statistics over the tokens of both, without Gram matrices."""
        count = self.count + other.count
        share = other.count / count
        mean = self.mean + share * (other.mean - self.mean)
        between = share * (1 - share) * (other.mean - self.mean).square()
        variance = (1 - share) * self.variance + share * other.variance + between
        norms = {name: torch.hypot(norm, other.source_norms[name]) for name, norm in self.source_norms.items()}
        routed = None if self.routed is None or other.routed is None else self.routed + other.routed
        return SiteStatistics(count, mean, variance, source_norms=norms, routed=routed)

    def to(self, device: torch.device) -> SiteStatistics:
        """Return the statistics on a device."""
        gram = None if self.gram is None else self.gram.to(device)
        norms = {name: norm.to(device) for name, norm in self.source_norms.items()}
        routed = None if self.routed is None else self.routed.to(device)
        return SiteStatistics(self.count, self.mean.to(device), self.variance.to(device), gram, norms, routed)

    @property
    def norm(self) -> torch.Tensor:
        """Root of the sum of squares of every feature, Wanda's ‖X_j‖₂: `[in_features]`, float32."""
        return ((self.variance + self.mean.square()) * self.count).sqrt()


class PlacedStatistics(Mapping[SiteKey, SiteStatistics]):
    """Statistics of sites that are moved to the device of their site when they are read.

    Args:
        sites (iterable of `Site`): sites of a model.
        statistics (mapping of site key to `SiteStatistics`): statistics of all or some of these sites, on any device.
    """

    def __init__(self, sites: Iterable[Site], statistics: Mapping[SiteKey, SiteStatistics]):
        self._outputs = {site.key: site.output for site in sites}
        self._statistics = statistics

    def __getitem__(self, key: SiteKey) -> SiteStatistics:
        return self._statistics[key].to(compute_device(self._outputs[key]))

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)
