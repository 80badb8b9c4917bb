"""The targets of projections in the dense model's residual stream: after their site, or after the next gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..architectures import Site, SiteKey


class Aim(NamedTuple):
    """A place in the dense model's residual stream: after a site.

    Args:
        layer (`int`): layer of the site.
        place (`int`): index of the site among those of its layer, from 0.
        is_last (`bool`): whether it is the last site of its layer, so that the place is the end of the layer.
    """

    layer: int
    place: int
    is_last: bool


class Aims:
    """The targets of all sites, and the number of layers that the dense model runs ahead for them.

    A site before sites without units can compensate for their outputs (ReplaceMe, arXiv 2505.02819). Its target is
    therefore the dense stream after these sites.

    Args:
        sites (sequence of `Site`): all sites of the dense model, in the order in which they write to the stream.
        kept (mapping of site key to sequence of `int`): the kept units.
        over_gaps (`bool`, defaults to `True`): whether targets are after gaps; otherwise they are after the own site.

    Attributes:
        before_gaps (`set[SiteKey]`): the keys of the sites with units whose targets are after a gap.
    """

    def __init__(self, sites: Sequence[Site], kept: Mapping[SiteKey, Sequence[int]], over_gaps: bool = True):
        self._aims: dict[SiteKey, Aim] = {}
        self.before_gaps: set[SiteKey] = set()
        aim: Aim | None = None
        for index in reversed(range(len(sites))):
            site = sites[index]
            is_last = index + 1 == len(sites) or sites[index + 1].layer != site.layer
            place = sum(other.layer == site.layer for other in sites[:index])
            after_gap = over_gaps and index + 1 < len(sites) and not kept[sites[index + 1].key]
            if aim is None or not after_gap:
                aim = Aim(site.layer, place, is_last)
            elif kept[site.key]:
                self.before_gaps.add(site.key)
            self._aims[site.key] = aim

    def of(self, site: Site) -> Aim:
        """Return the target of the projection of a site."""
        return self._aims[site.key]

    def layers_run(self, layer: int) -> int:
        """Return the number of layers that the dense model must run before the sites of layer number `layer` are
        fitted; 0 before the first layer."""
        if layer < 0:
            return 0
        return max(layer + 1, *(1 + aim.layer for key, aim in self._aims.items() if key.layer <= layer))
