"""The constraints of a request: which sites it may prune, how many units they keep at least, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..architectures import (
    Site,
)
from ..request.choices import Layout, Scope, UnitKind
from ..request.config import PruningConfig
from .steps import Steps
from .widths import channel_multiple, named_multiples


# The layers whose pruning harms deep models most (docs/benchmarks/quality.md).
ENDS = [0, 1, -2, -1]
FEWEST_WITH_ENDS = 12

# Number of widths that a coarse grid has for the widest MLP.
LEVELS = 16


def prunable_sites(sites: Iterable[Site], config: PruningConfig) -> list[Site]:
    """Return the sites that the request may prune: those of its kinds, except for the layers that it skips and sites
    of which no single unit can be removed.

    Raises:
        ValueError: where a skipped layer does not exist.
    """
    sites = list(sites)
    num_layers = 1 + max(site.layer for site in sites)
    skip_layers = _layers_to_skip(config, num_layers)
    for layer in skip_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"skip_layers names layer {layer}; the model has layers 0 to {num_layers - 1}.")
    skipped = {layer % num_layers for layer in skip_layers}
    return [site for site in sites if site.kind in config.width_kinds and site.layer not in skipped and not site.fixed]


def _layers_to_skip(config: PruningConfig, num_layers: int) -> list[int]:
    if config.skip_layers is None:
        return ENDS if spares_ends(config, num_layers) else []
    return config.skip_layers


def spares_ends(config: PruningConfig, num_layers: int) -> bool:
    """Return whether the first and last two layers of a model are not pruned by default."""
    by_default = (
        bool(config.width_kinds)
        and config.skip_layers is None
        and config.resolved_scope == Scope.LAYER
        and config.layout == Layout.ANY
    )
    return by_default and num_layers >= FEWEST_WITH_ENDS


def levels_of(site: Site, scores: torch.Tensor, config: PruningConfig) -> list[list[int]]:
    """Return the units that are kept by every cut that the request allows, with the smallest cut first."""
    steps = Steps(site, scores, config, additive=False)
    return [steps.kept(cut) for cut in range(1, len(steps.gone))]


def fewest_units(site: Site, config: PruningConfig) -> int:
    """Return the smallest number of units of `site` that the request allows."""
    steps = Steps(site, torch.zeros(site.num_units, dtype=torch.float32), config, additive=False)
    return site.num_units - int(steps.gone[-1])


def coarse_multiple(sites: Sequence[Site], config: PruningConfig) -> int:
    """Return a multiple of the widths that the request allows, with which the widest MLP has about `LEVELS` widths."""
    widest = max((site.num_units for site in sites if site.kind == UnitKind.MLP), default=1)
    multiple = channel_multiple(sites, config)
    return -(-widest // (LEVELS * multiple)) * multiple


def named_constraints(config: PruningConfig, sites: Sequence[Site]) -> list[str]:
    """Name the options that limit what can be removed from the sites of a model: those that are set, and defaults that
    can be relaxed."""
    num_layers = 1 + max(site.layer for site in sites)
    constraints = named_multiples(prunable_sites(sites, config), config)
    if constraints and config.target_speedup is not None:
        # These are the widths that were timed, whatever `multiple_of` is.
        constraints = [
            f"MLP widths in multiples of {channel_multiple(sites, config)}, which are those that were timed"
        ]
    if skip_layers := _layers_to_skip(config, num_layers):
        default = " (the default here; [] skips none)" if config.skip_layers is None else ""
        constraints.append(f"skip_layers={skip_layers}{default}")
    if config.cuts_alike and config.kinds is None and len(config.resolved_kinds) == 1:
        constraints = [constraint for constraint in constraints if constraint != config.alike_by]
        constraints.append(f"{config.alike_by}, which keeps all attention heads here")
    if config.kinds is not None and len(config.kinds) == 1:
        constraints.append(f"kinds={config.kinds}")
    # A site always keeps a unit, which is the constraint to name if there are no others.
    if config.min_units_per_site > 1 or not constraints:
        constraints.insert(0, f"min_units_per_site={config.min_units_per_site}")
    return constraints
