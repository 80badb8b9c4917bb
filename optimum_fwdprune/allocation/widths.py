"""The widths that a request allows a site: multiples for fast kernels, for blocks of quantized rows, and for devices
that share a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..architectures import Site
from ..request.choices import UnitKind
from ..request.config import PruningConfig
from ..request.fields import AUTO
from ..request.gguf import GGUF_TYPES


# With `multiple_of="auto"`, MLPs of so many channels or more in 16 bit keep widths that are multiples of this number.
# Matrix kernels of accelerators compute in tiles of 64 and more, and other widths take longer than the next multiple.
FEWEST_CHANNELS, TILE = 2048, 64


def width_step(site: Site, config: PruningConfig) -> int:
    """Return the number whose multiples the kept units of every group of a site are.

    With `tensor_parallel`, the channels of every single device are counted for `multiple_of="auto"`.
    """
    if site.routing is not None:
        return 1
    devices, block = config.tensor_parallel, block_of(config)
    step = devices // math.gcd(devices, site.num_groups)
    if block > 1:
        # The features of units are the rows' values, which blocks divide.
        step = math.lcm(step, block // math.gcd(block, site.num_groups * site.unit_width))
    return math.lcm(step, _multiple(site, config)) if site.kind == UnitKind.MLP else step


def block_of(config: PruningConfig) -> int:
    """Return the length of the blocks that must divide the rows of matrices."""
    return 1 if config.for_gguf is None else GGUF_TYPES[config.for_gguf].block


def channel_multiple(sites: Iterable[Site], config: PruningConfig) -> int:
    """Return the number whose multiples the pruned widths of all MLPs are."""
    return math.lcm(*(width_step(site, config) for site in sites if site.kind == UnitKind.MLP))


def named_multiples(sites: Iterable[Site], config: PruningConfig) -> list[str]:
    """Name the options that require multiples of the sites."""
    names = []
    multiple = max((_multiple(site, config) for site in sites if site.kind == UnitKind.MLP), default=1)
    if multiple > 1:
        by_default = f" (the default, {multiple} here)" if config.multiple_of == AUTO else ""
        names.append(f"multiple_of={config.multiple_of}{by_default}")
    if block_of(config) > 1:
        names.append(f"for_gguf={config.for_gguf!r}")
    if config.tensor_parallel > 1:
        names.append(f"tensor_parallel={config.tensor_parallel}")
    return names


def _multiple(site: Site, config: PruningConfig) -> int:
    """Return the number whose multiples an MLP keeps by `multiple_of`."""
    if config.multiple_of != AUTO:
        return int(config.multiple_of)
    channels = site.num_units if site.units_before is None else site.units_before
    is_wide = channels >= FEWEST_CHANNELS * config.tensor_parallel
    return TILE * config.tensor_parallel if is_wide and site.weight.element_size() == 2 else 1
