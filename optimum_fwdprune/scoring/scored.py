"""Which units a request scores."""

from __future__ import annotations

from collections.abc import Iterable

from ..allocation.depth import depth_units
from ..architectures import Site, SiteKey
from ..loading.subject import Subject
from ..request.config import PruningConfig
from ..request.registry import get_method


def scored_kinds(config: PruningConfig) -> list[str]:
    """Return the kinds of units that a request scores one by one: its own and, for methods whose scores may depend on
    the other kind, both heads and channels."""
    if config.width_kinds and get_method(config.method).by_site:
        return [kind for kind in config.unit_kinds if kind in config.resolved_kinds]
    return list(config.unit_kinds)


def scored_units(sites: Iterable[Site], config: PruningConfig) -> dict[SiteKey, tuple[int, str]]:
    """Return the numbers of scores that a request needs, with a name for messages, by their keys.

    Args:
        sites (iterable of `Site`): the sites of the model.
        config (`PruningConfig`): the request.
    """
    sites, kinds = list(sites), scored_kinds(config)
    units = {site.key: (site.num_units, str(site)) for site in sites if site.kind in kinds}
    if config.depth_kind is not None:
        units |= {unit.key: (1, str(unit)) for unit in depth_units(sites, config.depth_kind)}
    return units


def scored_sites(subject: Subject, config: PruningConfig) -> list[Site]:
    """Return the sites whose units a request scores; for layers and sublayers alone these are all sites."""
    if not config.unit_kinds:
        return subject.sites
    kinds = scored_kinds(config)
    return [site for site in subject.sites if site.kind in kinds]
