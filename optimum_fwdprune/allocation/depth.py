"""Layers and sublayers as units: which of them a request may remove, how many, and the choice by scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..architectures import Site, SiteKey
from ..request.choices import DepthKind, UnitKind
from ..request.config import PruningConfig
from .budgets import Budget, Cost, OutOfReach


@dataclass(frozen=True)
class DepthUnit:
    """A layer, or the attention or the MLP of a layer.

    Args:
        key (`SiteKey`): the key of its score: `(3, "layer")`, `(3, "attention_sublayer")` or `(3, "mlp_sublayer")`.
        sites (`list[Site]`): its sites.
    """

    key: SiteKey
    sites: Sequence[Site]

    def __str__(self) -> str:
        return f"layer {self.key.layer}" if self.key.kind == DepthKind.LAYER else str(self.sites[0])


def depth_units(sites: Iterable[Site], kind: str) -> list[DepthUnit]:
    """Return the layers or sublayers of a model.

    Args:
        sites (iterable of `Site`): the sites of the model, in their order.
        kind (`str`): a [`DepthKind`].
    """
    units: dict[SiteKey, list[Site]] = {}
    for site in sites:
        of_site = DepthKind.LAYER if kind == DepthKind.LAYER else f"{site.key.sublayer}_{DepthKind.SUBLAYER}"
        units.setdefault(SiteKey(site.layer, of_site), []).append(site)
    return [DepthUnit(key, of_unit) for key, of_unit in units.items()]


def open_units(sites: Iterable[Site], config: PruningConfig) -> list[DepthUnit]:
    """Return the layers or sublayers that a request may remove: those that are neither in `skip_layers` nor
    must stay."""
    assert config.depth_kind is not None
    units = depth_units(sites, config.depth_kind)
    layers = 1 + max(unit.key.layer for unit in units)
    skipped = {layer % layers for layer in config.skip_layers or ()}
    return [
        unit
        for unit in units
        if unit.key.layer not in skipped and not (unit.key.kind == DepthKind.LAYER and unit.sites[0].layer_stays)
    ]


def number_removed(sites: Iterable[Site], config: PruningConfig) -> int:
    """Return the number of layers or sublayers that a request for a share of them removes."""
    assert config.depth_kind is not None
    return round(config.share_of_depth * len(depth_units(sites, config.depth_kind)))


def removed_units(
    sites: Sequence[Site],
    scores: Mapping[SiteKey, torch.Tensor],
    config: PruningConfig,
    budget: Budget,
    number: int | None = None,
) -> list[DepthUnit]:
    """Choose the layers or sublayers to remove, the lowest scores first.

    Args:
        sites (sequence of `Site`): every site of the model.
        scores (mapping of `SiteKey` to `Tensor[1]`): scores of layers or sublayers by their keys; by default 0.
        config (`PruningConfig`): the request, with a `depth_kind`.
        budget (`Budget`): how much to remove, if the request has a target instead of a share.
        number (`int`, *optional*): how many to remove; by default the request decides.

    Raises:
        OutOfReach: where no layer with attention would be left; the message names the largest possible share.
    """
    units, total = open_units(sites, config), len(depth_units(sites, str(config.depth_kind)))
    to_target = budget.at_least or budget.at_most
    by_number = number is not None or bool(config.unit_kinds) or not to_target
    wanted = number_removed(sites, config) if number is None else number
    removed = list[DepthUnit]()

    def enough() -> bool:
        if by_number:
            return len(removed) >= wanted
        return saved_by(removed, sites, budget.cost) >= budget.amount

    for unit in sorted(units, key=lambda unit: float(scores[unit.key]) if unit.key in scores else 0.0):
        if enough():
            break
        if not by_number and budget.at_most and saved_by([*removed, unit], sites, budget.cost) > budget.amount:
            # The next round decides whether it is removed.
            break
        if can_go(sites, [*removed, unit]):
            removed.append(unit)
    if not enough() and not budget.as_far_as_possible:
        asked = f"{wanted} of {total}" if by_number else "as many as the target requires of"
        skipped = f" and skip_layers={config.skip_layers}" if config.skip_layers else ""
        staying = {site.layer for site in sites if site.layer_stays}
        first_layers = f", and so must the first {len(staying)} layers" if staying else ""
        field = "depth_sparsity" if config.unit_kinds else "sparsity"
        largest = int(len(removed) / total * 1e4) / 1e4
        if by_number:
            most = f"{field} is {largest:g}"
        else:
            total_cost = sum(budget.cost.total(site) for site in sites)
            most = budget.cost.most(saved_by(removed, sites, budget.cost), total_cost)
        raise OutOfReach(
            f"Removing {asked} {config.depth_kind}s is more than the model can lose: a layer with attention must be "
            f"kept{first_layers}{skipped}, so that only {len(removed)} can be removed. The largest possible {most}."
        )
    return removed


def saved_by(removed: Iterable[DepthUnit], sites: Sequence[Site], cost: Cost) -> int:
    """Return what the removal of these layers and sublayers together saves, norms left out.

    Args:
        removed (iterable of `DepthUnit`): the layers or sublayers.
        sites (sequence of `Site`): every site of the model.
        cost (`Cost`): the cost of sites.
    """
    return cost.whole([site for unit in removed for site in unit.sites], sites)


def can_go(sites: Sequence[Site], removed: Iterable[DepthUnit]) -> bool:
    """Return whether these layers and sublayers can be removed together: a layer with attention is left, and a
    sublayer of every layer that must stay."""
    gone = {site.key for unit in removed for site in unit.sites}
    left = [site for site in sites if site.key not in gone]
    must_stay = {site.layer for site in sites if site.layer_stays}
    return any(site.kind == UnitKind.ATTENTION for site in left) and must_stay <= {site.layer for site in left}
