"""What a request wants removed: how much, of which cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..architectures import Site
from ..request.config import PruningConfig


class OutOfReach(ValueError):
    """The constraints of a request do not allow its budget."""


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


@dataclass(frozen=True)
class ParameterCost:
    """The parameters that units own.

    Args:
        of_what (`str`, defaults to `"prunable"`): which parameters are counted, for messages.
        field (`str`, defaults to `"sparsity"`): of `PruningConfig`, that asks for a share of them.
    """

    of_what: str = "prunable"
    field: str = "sparsity"

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        return units * site.unit_parameters

    def total(self, site: Site) -> int:
        return site.num_parameters

    def asked(self, amount: int, total: int) -> str:
        return f"Removing {amount / total:.4g} of the {self.of_what} parameters"

    def most(self, amount: float, total: int) -> str:
        return f"{self.field} is {_floored(amount, total):g}"


@dataclass(frozen=True)
class TargetCost(ParameterCost):
    """Parameters that go so that the model fits into a target.

    Args:
        target, size (`int`): what the model may have and, without loss of any unit, would have.
        per_parameter (`int`): of that.
        unit (`str`): what is counted: parameters or bytes.
    """

    target: int = 0
    size: int = 0
    per_parameter: int = 1
    unit: str = "parameters"

    def asked(self, amount: int, total: int) -> str:
        return f"target_{self.unit}={self.target}, which removes {amount / total:.4g} of the prunable parameters,"

    def most(self, amount: float, total: int) -> str:
        smallest = math.ceil(self.size - _floored(amount, total) * total * self.per_parameter)
        return f"{super().most(amount, total)}, for target_{self.unit}={smallest}"


def _floored(amount: float, total: int) -> float:
    """The share, rounded so that it is no more."""
    return int(amount / total * 1e4) / 1e4


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
        heads (`int`, *optional*): what of it heads give with `budget="separate"`; by default their share of the cost.
        by_pool (`dict[int, tuple[int, int]]`, *optional*): what the sites of each pool give, and what of it their
            heads: by layer with `scope="layer"`, else all under 0. By default each gives the same share of its cost.
    """

    amount: int
    at_least: bool = False
    at_most: bool = False
    cost: Cost = PARAMETERS
    as_far_as_possible: bool = False
    heads: int | None = None
    by_pool: dict[int, tuple[int, int]] | None = None

    def divided(self, sizes: Mapping[int, int]) -> dict[int, int]:
        """Return the parts of those of such sizes, in proportion and rounded as the whole is."""
        total = sum(sizes.values())
        rounded = math.ceil if self.at_least else math.floor if self.at_most else round
        return {key: rounded(self.amount * size / total) for key, size in sizes.items()}


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
    size += added_parameters * per_parameter
    cost = TargetCost(target=target, size=size, per_parameter=per_parameter, unit=unit)
    return Budget(-(-(size - target) // per_parameter), at_least=True, cost=cost)
