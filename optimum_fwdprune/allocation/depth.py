"""Layers and sublayers as units: which a request may remove, how many, and which go by their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..architectures import Site, SiteKey
from ..request.choices import DepthKind, UnitKind
from ..request.config import PruningConfig
from .budgets import Budget, OutOfReach


@dataclass(frozen=True)
class DepthUnit:
    """A layer, or the attention or the MLP of one.

    Args:
        key (`SiteKey`): that it is scored under: `(3, "layer")`, `(3, "attention_sublayer")` or `(3, "mlp_sublayer")`.
        sites (`list[Site]`): the sites that it consists of.
    """

    key: SiteKey
    sites: Sequence[Site]

    @property
    def parameters(self) -> int:
        """Parameters that go with it, norms left out."""
        return sum(site.all_parameters for site in self.sites)

    def __str__(self) -> str:
        return f"layer {self.key.layer}" if self.key.kind == DepthKind.LAYER else str(self.sites[0])


def depth_units(sites: Iterable[Site], kind: str) -> list[DepthUnit]:
    """Return the layers or sublayers of a model.

    Args:
        sites (iterable of `Site`): of the model, in their order.
        kind (`str`): a [`DepthKind`].
    """
    units: dict[SiteKey, list[Site]] = {}
    for site in sites:
        of_site = DepthKind.LAYER if kind == DepthKind.LAYER else f"{site.kind}_{DepthKind.SUBLAYER}"
        units.setdefault(SiteKey(site.layer, of_site), []).append(site)
    return [DepthUnit(key, of_unit) for key, of_unit in units.items()]


def open_units(sites: Iterable[Site], config: PruningConfig) -> list[DepthUnit]:
    """Return the layers or sublayers that a request may remove: those outside of `skip_layers`."""
    assert config.depth_kind is not None
    units = depth_units(sites, config.depth_kind)
    layers = 1 + max(unit.key.layer for unit in units)
    skipped = {layer % layers for layer in config.skip_layers or ()}
    return [unit for unit in units if unit.key.layer not in skipped]


def number_removed(sites: Iterable[Site], config: PruningConfig) -> int:
    """Return how many layers or sublayers a request for a share of them removes."""
    assert config.depth_kind is not None
    return round(config.share_of_depth * len(depth_units(sites, config.depth_kind)))


def removed_units(
    sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor], config: PruningConfig, budget: Budget
) -> list[DepthUnit]:
    """Choose the layers or sublayers that go, the lowest scores first.

    Args:
        sites (sequence of `Site`): every site of the model.
        scores (mapping of `SiteKey` to `Tensor[1]`): of the layers or sublayers, by their keys; those without a score
            count as 0.
        config (`PruningConfig`): the request, with a `depth_kind`.
        budget (`Budget`): what is to be removed where the request is for a target and not for a share.

    Raises:
        OutOfReach: where a layer with attention would not be left, naming what is possible.
    """
    units, total = open_units(sites, config), len(depth_units(sites, str(config.depth_kind)))
    by_number = bool(config.width_kinds) or not budget.at_least
    wanted, removed = number_removed(sites, config), list[DepthUnit]()

    def enough() -> bool:
        if by_number:
            return len(removed) >= wanted
        return sum(unit.parameters for unit in removed) >= budget.amount

    for unit in sorted(units, key=lambda unit: float(scores[unit.key]) if unit.key in scores else 0.0):
        if enough():
            break
        if leaves_attention(sites, [*removed, unit]):
            removed.append(unit)
    if not enough():
        asked = f"{wanted} of {total}" if by_number else "as many as the target asks for of"
        skipped = f" and skip_layers={config.skip_layers}" if config.skip_layers else ""
        field = "depth_sparsity" if config.width_kinds else "sparsity"
        way_out = f"{field} is at most {int(len(removed) / total * 1e4) / 1e4:g}" if by_number else "ask for less"
        raise OutOfReach(
            f"Removing {asked} {config.depth_kind}s is more than the model can give: a layer with attention stays"
            f"{skipped}, so that {len(removed)} can go. {way_out[0].upper()}{way_out[1:]}."
        )
    return removed


def leaves_attention(sites: Iterable[Site], removed: Iterable[DepthUnit]) -> bool:
    """Whether a layer with attention is left without these layers or sublayers."""
    gone = {site.key for unit in removed for site in unit.sites}
    return any(site.kind == UnitKind.ATTENTION and site.key not in gone for site in sites)
