"""Sites, by which methods access a model: their units, and the parts of tensors that a unit owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..request.choices import AttentionUnit, UnitKind


T = TypeVar("T")
Key = TypeVar("Key", bound=tuple[int, str])


class SiteKey(NamedTuple):
    """The name of a site: `"3.mlp"` as text, and equal to the tuple `(3, "mlp")`.

    Args:
        layer (`int`): index of the decoder layer.
        kind (`str`): `"attention"` or `"mlp"`.
    """

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> SiteKey:
        """Return the key with the name `text`.

        Raises:
            ValueError: where the part before the first point is not an integer.
        """
        layer, _, kind = text.partition(".")
        return cls(int(layer), kind)


def keyed_by_site(values: Mapping[Key, T]) -> dict[SiteKey, T]:
    """Return `values` with keys that are [`SiteKey`]s; users and third-party methods may pass plain tuples."""
    return {SiteKey(*key): value for key, value in values.items()}


def unit_name(kind: str, attention_unit: str) -> str:
    """Return the name of units of a kind, in the plural; `attention_unit` is an [`AttentionUnit`]."""
    if kind == UnitKind.MLP:
        return "MLP channels"
    return "KV groups" if attention_unit == AttentionUnit.KV_GROUP else "query heads"


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks along one axis of a linear.

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
    """The part of a linear that the units of a site own: unit `u` owns its block of every segment that has one.

    Args:
        name (`str`): name of the linear inside the model.
        linear (`nn.Linear`): the linear, or a `TransposedLinear`, which has the same attributes.
        axis (`int`): 0 for output rows (weight and bias), 1 for input columns (weight only).
        segments (`tuple[Segment, ...]`): the segments of the axis, first to last. All units own an equal part of it.
    """

    name: str
    linear: nn.Linear
    axis: int
    segments: tuple[Segment, ...]

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
        """Return the parameters with this axis: the weight and, for output rows, the bias if there is one."""
        if self.axis == 0 and self.linear.bias is not None:
            return [("weight", self.linear.weight), ("bias", self.linear.bias)]
        return [("weight", self.linear.weight)]

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


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """A norm of queries or keys with weights for every head, which units of attention own.

    Args:
        name (`str`): name of the module inside the model.
        module (`Module`): a norm whose weight is `[heads, head_dim]`, or a list with a norm for every head.
        heads (`int`): number of consecutive heads that a unit owns.
    """

    name: str
    module: nn.Module
    heads: int

    @property
    def unit_parameters(self) -> int:
        """The number of parameters that a unit owns."""
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        one: Any = self.module if isinstance(self.module, nn.ModuleList) else self.module.weight
        return self.heads * parameters // len(one)

    def kept_heads(self, kept: Sequence[int]) -> list[int]:
        """Return the heads that are kept with the units `kept`."""
        return [unit * self.heads + head for unit in kept for head in range(self.heads)]


@dataclass(frozen=True, eq=False)
class Site:
    """A (layer, kind): the projection that writes to the residual stream, and the units of its input that can be cut.

    Args:
        layer (`int`): index of the decoder layer.
        kind (`str`): `"attention"` or `"mlp"`.
        projection_name (`str`): name of the output projection inside the model.
        projection (`nn.Linear`): the output projection, or a `TransposedLinear`; unit `u` is block `u` of its input
            features.
        num_units (`int`): number of units of the site.
        couplings (`tuple[Coupling, ...]`): every tensor that the units own a part of, including the projection.
        num_groups (`int`, defaults to 1): number of equal groups of consecutive units, which must all keep the same
            number of units (query heads that share keys and values).
        shared (`tuple[Coupling, ...]`, *optional*): linears with the same inputs as the sources that no unit owns a
            part of, so that they are not cut (keys and values of query heads that share them).
        pointwise (`bool`, defaults to `False`): whether the feature of a unit depends on the rows of the unit in the
            sources and on one token only.
        fixed (`str`, *optional*): the reason why no single unit can be removed, if there is one, as a clause.
        norms (`tuple[HeadNorm, ...]`, *optional*): norms of queries and keys with weights that units own.
        layer_stays (`bool`, defaults to `False`): whether the layer of the site cannot be removed whole.
    """

    layer: int
    kind: str
    projection_name: str
    projection: nn.Linear
    num_units: int
    couplings: tuple[Coupling, ...]
    num_groups: int = 1
    shared: tuple[Coupling, ...] = ()
    pointwise: bool = False
    fixed: str = ""
    norms: tuple[HeadNorm, ...] = ()
    layer_stays: bool = False

    @property
    def key(self) -> SiteKey:
        return SiteKey(self.layer, self.kind)

    @property
    def unit_width(self) -> int:
        """The number of input features of the projection per unit."""
        return self.projection.in_features // self.num_units

    @property
    def sources(self) -> list[Coupling]:
        """The linears that compute the features of units, all from the same input."""
        return [*(coupling for coupling in self.couplings if coupling.axis == 0), *self.shared]

    @property
    def unit_parameters(self) -> int:
        """The number of parameters that a unit owns, including biases and norms."""
        of_linears = sum(
            coupling.owned_width() * (parameter.numel() // parameter.shape[coupling.axis])
            for coupling, parameter in self.owned_parameters()
        )
        return of_linears + sum(norm.unit_parameters for norm in self.norms)

    @property
    def num_parameters(self) -> int:
        """The number of parameters that all units own, which are the prunable parameters of the site."""
        return self.num_units * self.unit_parameters

    @property
    def all_parameters(self) -> int:
        """Parameters of its projection and sources, those that no unit owns included. All go with the whole site."""
        linears = {id(coupling.linear): coupling.linear for coupling in (*self.couplings, *self.shared)}
        modules = [*linears.values(), *(norm.module for norm in self.norms)]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def owned_parameters(self) -> list[tuple[Coupling, torch.Tensor]]:
        """Return the parameters of linears that units own a part of, with the coupling that describes this part."""
        return [(coupling, parameter) for coupling in self.couplings for _, parameter in coupling.parameters()]

    def sum_owned(self, coupling: Coupling, parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sum `values`, `[..., *parameter.shape]`, over the entries that a unit owns: `[..., num_units]`."""
        along_axis = values.sum(-1 if coupling.axis == 0 else -2) if parameter.dim() == 2 else values
        return coupling.sum_per_unit(self.num_units, along_axis)

    def unit_mask(self, kept: Sequence[int]) -> torch.Tensor:
        """Return a bool tensor `[num_units]` that is true for the units `kept`."""
        mask = torch.zeros(self.num_units, dtype=torch.bool)
        # A tuple would be an index into several axes.
        mask[list(kept)] = True
        return mask

    def feature_mask(self, unit_mask: torch.Tensor) -> torch.Tensor:
        """Return a mask over the projection's input features from a mask over units, `[..., num_units]`."""
        return unit_mask.repeat_interleave(self.unit_width, dim=-1)

    def kept_features(self, kept: Sequence[int]) -> torch.Tensor:
        """Return a mask of the input features that the units `kept` own: bool, `[in_features]`, on the device of the
        projection."""
        return self.feature_mask(self.unit_mask(kept)).to(self.projection.weight.device)

    def sum_features(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over the input features of every unit: `[in_features]` -> `[num_units]`."""
        return values.view(self.num_units, self.unit_width).sum(1)

    def __str__(self) -> str:
        return f"{self.kind} of layer {self.layer}"
