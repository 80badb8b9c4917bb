"""The mean output of removed features as a bias (FLAP, arXiv 2312.11983)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..architectures import Site, SiteKey
from ..forward.gates import Projection
from ..forward.statistics import (
    SiteStatistics,
)
from ..request.choices import ReconstructionKind


def added_parameters(sites: Iterable[Site], kind: str) -> int:
    """Return the number of parameters that a reconstruction adds to the model: biases of projections without one."""
    if kind != ReconstructionKind.BIAS:
        return 0
    return sum(site.projection.out_features for site in sites if _lacks_bias(site))


def kinds_gaining_bias(sites: Sequence[Site], kept: Mapping[SiteKey, list[int]], reconstruction: str) -> set[str]:
    """Return the kinds of sites whose projections get a new bias.

    Args:
        sites (sequence of `Site`): all sites of the dense model.
        kept (mapping of site key to `list[int]`): the kept units.
        reconstruction (`str`): a [`ReconstructionKind`].
    """
    if reconstruction != ReconstructionKind.BIAS:
        return set()
    losing = {site.kind for site in sites if 0 < len(kept[site.key]) < site.num_units}
    return {site.kind for site in sites if site.kind in losing and _lacks_bias(site)}


def _lacks_bias(site: Site) -> bool:
    return site.routing is None and site.projection.bias is None


def compensate_bias(site: Site, kept: list[int], statistics: SiteStatistics) -> Projection:
    """Return the projection of the kept columns, whose bias includes the mean output of the removed features."""
    weight, bias = site.projection.weight, site.projection.bias
    features = site.kept_features(kept)
    lost = weight[:, ~features].float() @ statistics.mean[~features]
    total = lost if bias is None else bias.float() + lost
    return Projection(kept, weight[:, features], total.to(weight.dtype))
