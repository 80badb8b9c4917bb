"""The parts of tensors that units own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks along one axis of a tensor.

    Args:
        width (`int`): number of rows or columns of a block; an owned segment has one block per unit.
        units (`range`, *optional*): the units that own a block, in their order; by default all units of the site.
        owned (`bool`, defaults to `True`): `False` for a single block of rows that no unit owns and that are always
            kept, such as the key and value rows of a fused projection if query heads are the units.
    """

    width: int
    units: range | None = None
    owned: bool = True

    def owners(self, num_units: int) -> range:
        """Return the units that own a block, of a site with `num_units` units."""
        if not self.owned:
            return range(0)
        return range(num_units) if self.units is None else self.units

    def length(self, num_units: int) -> int:
        """Return the size of the segment along the axis, for a site with `num_units` units."""
        return self.width * len(self.owners(num_units)) if self.owned else self.width


@dataclass(frozen=True, eq=False)
class Coupling:
    """The part of a module that the units of a site own: unit `u` owns its block of every segment that has one.

    Args:
        name (`str`): name of the module inside the model.
        module (`nn.Module`): a linear, or a `TransposedLinear`, which has the same attributes; or a module with other
            `tensors`.
        axis (`int`): of a linear 0 for output rows (weight and bias), 1 for input columns (weight only); of other
            tensors the axis of each of them.
        segments (`tuple[Segment, ...]`): the segments of the axis, first to last. All units own an equal part of it.
        tensors (`tuple[str, ...]`, *optional*): names of the parameters and buffers of a module that is no linear.
    """

    name: str
    module: nn.Module
    axis: int
    segments: tuple[Segment, ...]
    tensors: tuple[str, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether the units own rows or columns of a linear."""
        return not self.tensors

    @property
    def linear(self) -> Any:
        """The linear that the units own rows or columns of."""
        assert self.is_linear, f"{self.name} is no linear."
        return self.module

    def kept_index(self, num_units: int, kept: Sequence[int]) -> torch.Tensor:
        """Return the indices along the axis that are kept with the units `kept`, as an int64 tensor."""
        units = torch.as_tensor(kept, dtype=torch.int64)
        pieces, start = [], 0
        for segment in self.segments:
            if segment.owned:
                owners = segment.owners(num_units)
                own = units[(units >= owners.start) & (units < owners.stop)] - owners.start
                blocks = start + own[:, None] * segment.width + torch.arange(segment.width)
                pieces.append(blocks.flatten())
            else:
                pieces.append(torch.arange(start, start + segment.width))
            start += segment.length(num_units)
        return torch.cat(pieces)

    def parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Return the parameters with this axis: of a linear the weight and, for output rows, the bias if there is
        one."""
        return [(name, tensor) for name, tensor in self.own_tensors() if name not in self.module._buffers]

    def own_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Return the parameters and buffers with this axis, by their names in the module."""
        names = self.tensors or (("weight", "bias") if self.axis == 0 else ("weight",))
        tensors = ((name, getattr(self.module, name)) for name in names)
        return [(name, tensor) for name, tensor in tensors if tensor is not None]

    def owned_width(self) -> int:
        """Return the number of indices along the axis that a unit owns."""
        return sum(
            segment.width
            for segment in self.segments
            if segment.owned and (segment.units is None or 0 in segment.units)
        )

    def sum_per_unit(self, num_units: int, values: torch.Tensor) -> torch.Tensor:
        """Sum `values`, `[..., size of the axis]`, over the indices that a unit owns: `[..., num_units]`."""
        total = values.new_zeros(*values.shape[:-1], num_units)
        start = 0
        for segment in self.segments:
            owners, length = segment.owners(num_units), segment.length(num_units)
            if owners:
                blocks = values[..., start : start + length].unflatten(-1, (len(owners), segment.width))
                total[..., owners.start : owners.stop] += blocks.sum(-1)
            start += length
        return total
