"""Where in the dense model's residual stream projections aim: after themselves, or after the gap that follows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..architectures import Site, SiteKey


class Aim(NamedTuple):
    """A place in the dense model's residual stream: after a site.

    Args:
        layer (`int`): of the site.
        place (`int`): of the site among those of its layer, from 0.
        is_last (`bool`): whether it is the last of its layer, so that the place is the end of the layer.
    """

    layer: int
    place: int
    is_last: bool


class Aims:
    """The aims of all sites, and how far the dense model runs ahead for them.

    A site that is followed by sites without units is the last that writes before these: what they wrote in the dense
    model is what it can take over (ReplaceMe, arXiv 2505.02819). So it aims at the dense stream after them.

    Args:
        sites (sequence of `Site`): all sites of the dense model, in the order in which they write.
        kept (mapping of site key to sequence of `int`): units that stay.
        over_gaps (`bool`, defaults to `True`): `False` where no site aims beyond itself.
    """

    def __init__(self, sites: Sequence[Site], kept: Mapping[SiteKey, Sequence[int]], over_gaps: bool = True):
        self._aims: dict[SiteKey, Aim] = {}
        aim: Aim | None = None
        for index in reversed(range(len(sites))):
            site = sites[index]
            is_last = index + 1 == len(sites) or sites[index + 1].layer != site.layer
            place = sum(other.layer == site.layer for other in sites[:index])
            after_gap = over_gaps and index + 1 < len(sites) and not kept[sites[index + 1].key]
            if aim is None or not after_gap:
                aim = Aim(site.layer, place, is_last)
            self._aims[site.key] = aim

    def of(self, site: Site) -> Aim:
        """Return where the projection of a site aims."""
        return self._aims[site.key]

    def layers_run(self, layer: int) -> int:
        """Return how many layers of the dense model must have run before the sites of layer number `layer` are fitted;
        0 before the first."""
        if layer < 0:
            return 0
        return max(layer + 1, *(1 + aim.layer for key, aim in self._aims.items() if key.layer <= layer))
