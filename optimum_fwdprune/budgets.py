"""What a request wants removed: how much, of which cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from .architectures import Site
from .configuration import PruningConfig


class Cost(Protocol):
    """What sites cost by the number of units that they keep, in whole numbers that add up over sites."""

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        """Return the cost of `site` with so many units, int64 as `units`; every unit costs something."""

    def total(self, site: Site) -> int:
        """Return the cost of all its units."""

    def asked(self, amount: int, total: int) -> str:
        """Say in the user's words that `amount` of `total` was to be removed."""

    def most(self, amount: float, total: int) -> str:
        """Say in the user's words that at most `amount` can be."""


class ParameterCost:
    """The parameters that units own."""

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        return units * site.unit_parameters

    def total(self, site: Site) -> int:
        return site.num_parameters

    def asked(self, amount: int, total: int) -> str:
        return f"Removing {amount / total:.4g} of the prunable parameters"

    def most(self, amount: float, total: int) -> str:
        return f"sparsity is {int(amount / total * 1e4) / 1e4:g}"


PARAMETERS = ParameterCost()


@dataclass(frozen=True)
class Budget:
    """How much to remove.

    Args:
        amount (`int`): of the cost.
        at_least, at_most (`bool`, default to `False`): round up, for a target that the model must fit into, or down,
            on the way to one; otherwise to the nearest number that whole units allow.
        cost (`Cost`): by default parameters.
        as_far_as_possible (`bool`, defaults to `False`): remove less where the constraints leave less to remove.
    """

    amount: int
    at_least: bool = False
    at_most: bool = False
    cost: Cost = PARAMETERS
    as_far_as_possible: bool = False


def removal_budget(
    config: PruningConfig, sites: Iterable[Site], model_parameters: int, model_bytes: int, added_parameters: int = 0
) -> Budget:
    """Translate what the user asked for into a number of prunable parameters to remove.

    Args:
        config (`PruningConfig`): the request.
        sites (iterable of `Site`): every site of the model, pruned kinds or not.
        model_parameters (`int`): parameters of the whole model.
        model_bytes (`int`): bytes of its weights on disk.
        added_parameters (`int`): parameters that reconstruction will add (projection biases).

    Raises:
        ValueError: where the target is larger than the model.
    """
    sites = list(sites)
    prunable = sum(site.num_parameters for site in sites)
    item_size = sites[0].projection.weight.element_size()
    if config.target_parameters is not None:
        target, size, per_parameter, unit = config.target_parameters, model_parameters, 1, "parameters"
    elif config.target_bytes is not None:
        target, size, per_parameter, unit = config.target_bytes, model_bytes, item_size, "bytes"
    else:
        return Budget(round(config.sparsity * prunable))
    if target > size:
        raise ValueError(f"target_{unit} is {target:,} and the model has only {size:,} {unit}; nothing to prune.")
    excess = size + added_parameters * per_parameter - target
    return Budget(-(-excess // per_parameter), at_least=True)
