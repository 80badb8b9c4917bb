"""Sites, by which methods access a model: their units, and the parts of tensors that a unit owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..request.choices import AttentionUnit, UnitKind
from .coupling import Coupling
from .routing import Routing


T = TypeVar("T")
Key = TypeVar("Key", bound=tuple[int, str])


class SiteKey(NamedTuple):
    """The name of a site: `"3.mlp"` as text, and equal to the tuple `(3, "mlp")`.

    Args:
        layer (`int`): index of the decoder layer.
        kind (`str`): `"attention"`, `"mlp"` or `"expert"`.
    """

    layer: int
    kind: str

    @property
    def sublayer(self) -> str:
        """The sublayer of the site, `"attention"` or `"mlp"`. A mixture of experts is in the place of the MLP."""
        return self.kind if self.kind == UnitKind.ATTENTION else UnitKind.MLP

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
    names: dict[str, str] = {UnitKind.MLP: "MLP channels", UnitKind.EXPERT: "experts"}
    if kind in names:
        return names[kind]
    return "KV groups" if attention_unit == AttentionUnit.KV_GROUP else "query heads"


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
    """A (layer, kind): the module that writes to the residual stream, and the units before it that can be cut.

    This module is the output projection of an attention or an MLP, or a whole mixture of experts (`routing`).

    Args:
        layer (`int`): index of the decoder layer.
        kind (`str`): `"attention"`, `"mlp"` or `"expert"`.
        output_name (`str`): name inside the model of the module that writes to the residual stream.
        output (`nn.Module`): this module: the output projection, a linear or a `TransposedLinear`, of which unit `u`
            is block `u` of its input features; or a mixture.
        num_units (`int`): number of units of the site.
        couplings (`tuple[Coupling, ...]`): every tensor that the units own a part of, including the projection.
        modules (`tuple[nn.Module, ...]`): the modules that are removed with the whole site, norms left out.
        num_groups (`int`, defaults to 1): number of equal groups of consecutive units, which must all keep the same
            number of units (query heads that share keys and values, or groups of experts).
        shared (`tuple[Coupling, ...]`, *optional*): linears with the same inputs as the sources that no unit owns a
            part of, so that they are not cut (keys and values of query heads that share them).
        pointwise (`bool`, defaults to `False`): whether the feature of a unit depends on the rows of the unit in the
            sources and on one token only.
        fixed (`str`, *optional*): the reason why no single unit can be removed, if there is one, as a clause.
        norms (`tuple[HeadNorm, ...]`, *optional*): norms of queries and keys with weights that units own.
        layer_stays (`bool`, defaults to `False`): whether the layer of the site cannot be removed whole.
        window (`int`, *optional*): the number of tokens that the attention of the site reaches back, in a model whose
            layers differ in it; `None` where it reaches all tokens.
        routing (`Routing`, *optional*): router and experts of a site whose units are experts.
        units_before (`int`, *optional*): number of units before earlier rounds of the same pruning; by default
            `num_units`.
    """

    layer: int
    kind: str
    output_name: str
    output: nn.Module
    num_units: int
    couplings: tuple[Coupling, ...]
    modules: tuple[nn.Module, ...]
    num_groups: int = 1
    shared: tuple[Coupling, ...] = ()
    pointwise: bool = False
    fixed: str = ""
    norms: tuple[HeadNorm, ...] = ()
    layer_stays: bool = False
    window: int | None = None
    routing: Routing | None = None
    units_before: int | None = None

    @property
    def projection(self) -> Any:
        """The output projection, a linear or a `TransposedLinear`, of a site without experts."""
        assert self.routing is None, f"The {self} have no single projection."
        return self.output

    @property
    def weight(self) -> torch.Tensor:
        """A weight of the site, for its dtype and device: that of its first coupling."""
        return self.couplings[0].parameters()[0][1]

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
        owned = (coupling for coupling in self.couplings if coupling.is_linear and coupling.axis == 0)
        return [*owned, *self.shared]

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
        """The parameters that are removed with the whole site, those that no unit owns included."""
        return sum(parameter.numel() for module in self.modules for parameter in module.parameters())

    @property
    def idle_parameters(self) -> int:
        """The parameters of the experts that a token does not use; 0 of a site without experts."""
        return 0 if self.routing is None else (self.num_units - self.routing.chosen) * self.idle_unit_parameters

    @property
    def idle_unit_parameters(self) -> int:
        """The parameters of a unit that tokens which do not use it leave out: those of an expert without its row of
        the router; 0 of a site without experts."""
        if self.routing is None:
            return 0
        return sum(parameter.numel() for parameter in self.routing.experts.parameters()) // self.num_units

    @property
    def fewest_units(self) -> int:
        """The smallest number of units with which the site can compute, if any are left."""
        return 1 if self.routing is None else self.routing.fewest

    def owned_parameters(self) -> list[tuple[Coupling, torch.Tensor]]:
        """Return the parameters of linears that units own a part of, with the coupling that describes this part."""
        return [(coupling, parameter) for coupling in self.couplings for _, parameter in coupling.parameters()]

    def owned_weights(self) -> list[tuple[Coupling, torch.Tensor]]:
        """Return the same of linears only."""
        return [entry for entry in self.owned_parameters() if entry[0].is_linear]

    def sum_owned(self, coupling: Coupling, parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sum `values`, `[..., *parameter.shape]`, over the entries that a unit owns: `[..., num_units]`."""
        others = [axis - parameter.dim() for axis in range(parameter.dim()) if axis != coupling.axis]
        along_axis = values.sum(others) if others else values
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
        return f"{'experts' if self.routing is not None else self.kind} of layer {self.layer}"
