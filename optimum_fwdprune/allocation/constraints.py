"""Which sites a request may prune, how narrow they may get, and how its constraints are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..architectures import (
    Site,
)
from ..request.choices import Layout, Scope, UnitKind
from ..request.config import PruningConfig
from .steps import Steps


# The layers that a deep model can least do without (docs/quality.md).
ENDS = [0, 1, -2, -1]
FEWEST_WITH_ENDS = 12

# Steps in which a coarse grid takes the widest cut of an MLP.
LEVELS = 16


def prunable_sites(sites: Iterable[Site], config: PruningConfig) -> list[Site]:
    """Return the sites that the request may prune: of its kinds, outside of the layers that it skips.

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
    return [site for site in sites if site.kind in config.width_kinds and site.layer not in skipped]


def _layers_to_skip(config: PruningConfig, num_layers: int) -> list[int]:
    if config.skip_layers is None:
        return ENDS if spares_ends(config, num_layers) else []
    return config.skip_layers


def spares_ends(config: PruningConfig, num_layers: int) -> bool:
    """Whether the first and last layers of a model stay unpruned by default."""
    by_default = config.skip_layers is None and config.resolved_scope == Scope.LAYER and config.layout == Layout.ANY
    return by_default and num_layers >= FEWEST_WITH_ENDS


def levels_of(site: Site, scores: torch.Tensor, config: PruningConfig) -> list[list[int]]:
    """Return the units that stay after each of the cuts that the request allows, the smallest cut first."""
    steps = Steps(site, scores, config, additive=False)
    return [steps.kept(cut) for cut in range(1, len(steps.gone))]


def fewest_units(site: Site, config: PruningConfig) -> int:
    """Return how many units `site` keeps at least under the request."""
    steps = Steps(site, torch.zeros(site.num_units, dtype=torch.float32), config, additive=False)
    return site.num_units - int(steps.gone[-1])


def coarse_multiple(sites: Sequence[Site], config: PruningConfig) -> int:
    """Return a multiple of `multiple_of` that gives the widest MLP about `LEVELS` widths."""
    widest = max((site.num_units for site in sites if site.kind == UnitKind.MLP), default=1)
    return -(-widest // (LEVELS * config.multiple_of)) * config.multiple_of


def named_constraints(config: PruningConfig, num_layers: int) -> list[str]:
    """Name the options that limit what can be removed: those that are set, and defaults that can be relaxed."""
    constraints = []
    if config.multiple_of > 1:
        # Under a speed-up these are the widths that were timed, whatever the request says.
        timed = f"MLP widths in multiples of {config.multiple_of}, which are those that were timed"
        constraints.append(timed if config.target_speedup is not None else f"multiple_of={config.multiple_of}")
    if skip_layers := _layers_to_skip(config, num_layers):
        default = " (the default here, [] spares none)" if config.skip_layers is None else ""
        constraints.append(f"skip_layers={skip_layers}{default}")
    if config.layout == Layout.STOCK and config.kinds is None and len(config.resolved_kinds) == 1:
        constraints.append("layout='stock', which leaves the attention heads whole here")
    if config.kinds is not None and len(config.kinds) == 1:
        constraints.append(f"kinds={config.kinds}")
    # One unit always stays, which is what there is to name where nothing else is.
    if config.min_units_per_site > 1 or not constraints:
        constraints.insert(0, f"min_units_per_site={config.min_units_per_site}")
    return constraints
