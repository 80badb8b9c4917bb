"""Budgets: how much a request removes, and in which cost it is counted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..architectures import Site
from ..request.config import PruningConfig


# The unit of target_active_parameters: parameters that one token uses.
ACTIVE = "active_parameters"


class OutOfReach(ValueError):
    """The constraints of a request do not allow its budget."""


class Cost(Protocol):
    """The cost of sites by the number of units that they keep, in integers that are summed over sites."""

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        """Return the cost of `site` for these numbers of units, int64 like `units`; every unit has a positive cost."""

    def total(self, site: Site) -> int:
        """Return the cost of all units of `site`."""

    def whole(self, gone: Collection[Site], sites: Collection[Site]) -> int:
        """Return what the removal of the whole sites `gone` from a model with the sites `sites` saves. A layer that
        loses all its sites may save more than these do."""

    def asked(self, amount: int, total: int) -> str:
        """Describe for the user the request to remove `amount` of `total`."""

    def most(self, amount: float, total: int) -> str:
        """Describe for the user that at most `amount` of `total` can be removed."""


@dataclass(frozen=True)
class ParameterCost:
    """The parameters that units own.

    Args:
        of_what (`str`, defaults to `"prunable"`): which parameters are counted, for messages.
        field (`str`, defaults to `"sparsity"`): the field of `PruningConfig` with the share of them to remove.
    """

    of_what: str = "prunable"
    field: str = "sparsity"

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        return units * site.unit_parameters

    def total(self, site: Site) -> int:
        return site.num_parameters

    def whole(self, gone: Collection[Site], sites: Collection[Site]) -> int:
        return sum(self.total(site) for site in gone)

    def asked(self, amount: int, total: int) -> str:
        return f"Removing {amount / total:.4g} of the {self.of_what} parameters"

    def most(self, amount: float, total: int) -> str:
        return f"{self.field} is {_floored(amount, total):g}"


@dataclass(frozen=True)
class TargetCost(ParameterCost):
    """Parameters that are removed so that the model fits into a target.

    Args:
        target, size (`int`): the size that the model may have, and its size with all units.
        per_parameter (`int`): the size of a parameter.
        unit (`str`): the unit of sizes, `"parameters"`, `"active_parameters"` or `"bytes"`.
    """

    target: int = 0
    size: int = 0
    per_parameter: int = 1
    unit: str = "parameters"

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        return units * self._per_unit(site)

    def total(self, site: Site) -> int:
        return site.num_units * self._per_unit(site)

    def _per_unit(self, site: Site) -> int:
        # A token uses as many experts as before, and fewer rows of the router.
        return site.unit_parameters - (site.idle_unit_parameters if self.unit == ACTIVE else 0)

    def whole(self, gone: Collection[Site], sites: Collection[Site]) -> int:
        # The target is for the whole model, and not only for what units own.
        idle = sum(site.idle_parameters for site in gone) if self.unit == ACTIVE else 0
        return sum(site.all_parameters for site in gone) - idle

    def asked(self, amount: int, total: int) -> str:
        if amount > total:
            outside = self.size - total * self.per_parameter
            return f"target_{self.unit}={self.target:,}, where {outside:,} belong to no unit that can be removed,"
        return f"target_{self.unit}={self.target:,}, which removes {amount / total:.4g} of the prunable parameters,"

    def most(self, amount: float, total: int) -> str:
        smallest = math.ceil(self.size - _floored(amount, total) * total * self.per_parameter)
        return f"{super().most(amount, total)}, for target_{self.unit}={smallest:,}"


def _floored(amount: float, total: int) -> float:
    """Return the share, rounded down to four digits."""
    return int(amount / total * 1e4) / 1e4


PARAMETERS = ParameterCost()


@dataclass(frozen=True)
class Budget:
    """How much to remove.

    Args:
        amount (`int`): the cost to remove.
        at_least, at_most (`bool`, default to `False`): round up, for a target that the model must fit into, or down,
            for rounds before such a target is met. By default the nearest number that whole units allow is removed.
        cost (`Cost`): how units are counted, by default by their parameters.
        spent (`int`, defaults to 0): the cost that removed layers, sublayers and experts have saved already, for
            messages.
        beside (`int`, defaults to 0): the cost of the experts that are kept, for messages.
        as_far_as_possible (`bool`, defaults to `False`): remove less if the constraints do not allow the amount.
        heads (`int`, *optional*): the part of it that heads lose with `budget="separate"`; by default their share of
            the cost.
        by_pool (`dict[int, tuple[int, int]]`, *optional*): the amount that the sites of a pool lose, and the part of
            it that heads lose. Keys are layers with `scope="layer"`, and otherwise 0. By default all pools lose the
            same share of their cost.
    """

    amount: int
    at_least: bool = False
    at_most: bool = False
    cost: Cost = PARAMETERS
    spent: int = 0
    beside: int = 0
    as_far_as_possible: bool = False
    heads: int | None = None
    by_pool: dict[int, tuple[int, int]] | None = None

    def divided(self, sizes: Mapping[int, int]) -> dict[int, int]:
        """Return the parts of the amount in proportion to sizes, rounded in the direction of the budget."""
        total = sum(sizes.values())
        rounded = math.ceil if self.at_least else math.floor if self.at_most else round
        return {key: rounded(self.amount * size / total) for key, size in sizes.items()}


def counted_sites(sites: Iterable[Site], config: PruningConfig) -> list[Site]:
    """Return the sites whose parameters the sparsity of a request refers to.

    For heads and channels these are all attentions and MLPs, for experts the mixtures. The dense MLPs that some layers
    of a mixture have, whose channels cannot be removed, are left out. For layers or sublayers, alone or in addition to
    experts, all are returned.
    """
    sites = list(sites)
    if not config.unit_kinds or (config.prunes_experts and config.depth_kind is not None):
        return sites
    has_experts = any(site.routing is not None for site in sites)
    return [site for site in sites if site.kind in config.unit_kinds and not (has_experts and site.fixed)]


def removal_budget(
    config: PruningConfig, sites: Iterable[Site], model_parameters: int, model_bytes: int, added_parameters: int = 0
) -> Budget:
    """Convert the budget of a request into a number of prunable parameters to remove.

    Args:
        config (`PruningConfig`): the request.
        sites (iterable of `Site`): every site of the model, also of kinds that are not pruned.
        model_parameters (`int`): number of parameters of the whole model.
        model_bytes (`int`): size of its weights on disk in bytes.
        added_parameters (`int`): number of parameters that reconstruction will add (biases of projections).

    Raises:
        ValueError: where the target is larger than the model.
    """
    sites = list(sites)
    item_size = sites[0].weight.element_size()
    if config.target_parameters is not None:
        target, size, per_parameter, unit = config.target_parameters, model_parameters, 1, "parameters"
    elif config.target_active_parameters is not None:
        active = model_parameters - sum(site.idle_parameters for site in sites)
        target, size, per_parameter, unit = config.target_active_parameters, active, 1, ACTIVE
    elif config.target_bytes is not None:
        target, size, per_parameter, unit = config.target_bytes, model_bytes, item_size, "bytes"
    else:
        return Budget(round(config.sparsity * sum(site.num_parameters for site in counted_sites(sites, config))))
    if target > size:
        raise ValueError(
            f"target_{unit} is {target:,}, and the model has only {size:,} {unit.replace('_', ' ')}, so that nothing "
            f"would be pruned. Choose a smaller target."
        )
    size += added_parameters * per_parameter
    cost = TargetCost(target=target, size=size, per_parameter=per_parameter, unit=unit)
    return Budget(-(-(size - target) // per_parameter), at_least=True, cost=cost)
