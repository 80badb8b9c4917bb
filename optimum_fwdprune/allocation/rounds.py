"""Pruning in several rounds with new scores in every round: how much a round removes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..architectures import (
    Site,
    SiteKey,
)
from ..request.choices import UnitKind
from ..request.config import PruningConfig
from .allocate import allocate, pool_of
from .budgets import Budget, ParameterCost, counted_sites
from .constraints import prunable_sites
from .depth import depth_units, number_removed
from .plan import PruningPlan


# Why no single unit of a site can be removed in a later round.
LAST_UNITS = "it is the last query head of its KV group."

# A sparsity must be below 1.
ALMOST_ALL = 1 - 1e-9


class Rounds:
    """Divides a request into `config.rounds` rounds, where a round prunes the model that the previous round returned.

    Args:
        sites (sequence of `Site`): the sites of the dense model.
        config (`PruningConfig`): the request.
        budget (`Budget`): how much all rounds together remove.

    Raises:
        ValueError: where the constraints do not allow the budget of several rounds.
    """

    def __init__(self, sites: Sequence[Site], config: PruningConfig, budget: Budget):
        self.config = config
        self._budget = budget
        # Costs by the number of kept units. They are stored, since surgery changes the dense model and its sites.
        self._costs = {site.key: budget.cost.of(site, torch.arange(site.num_units + 1)) for site in sites}
        layers = {site.layer: [other for other in sites if other.layer == site.layer] for site in sites}
        # What whole sites save, and what a layer saves in addition once all its sites are gone.
        self._whole = {site.key: budget.cost.whole([site], sites) for site in sites}
        # A layer with a single site has nothing in addition.
        self._rest = {
            layer: budget.cost.whole(of_layer, sites) - sum(self._whole[site.key] for site in of_layer)
            for layer, of_layer in layers.items()
        }
        # The sites that the sparsity refers to.
        self._counted = {site.key for site in counted_sites(sites, config)}
        self._units = {site.key: (site.num_groups, site.unit_parameters) for site in sites}
        # The cost of the prunable sites of every pool, by kind.
        self._pools: dict[int, dict[str, int]] = {}
        for site in prunable_sites(sites, config):
            of_kinds = self._pools.setdefault(pool_of(site, config.resolved_scope), dict.fromkeys(UnitKind, 0))
            of_kinds[site.kind] += budget.cost.total(site)
        # The layers or sublayers of the model, and how many of them all rounds remove.
        self._depth_units = len(depth_units(sites, str(config.depth_kind)))
        self._depth = 0 if config.depth_kind is None else number_removed(sites, config)
        # The keys in the dense model of the sites that are left, by their present keys.
        self._dense = {site.key: site.key for site in sites}
        if config.rounds > 1:
            # A budget that cannot be met at the end is refused before the first cut.
            zeros = {site.key: torch.zeros(site.num_units, dtype=torch.float32) for site in sites}
            allocate(list(sites), zeros, config, budget)

    def follow(self, plan: PruningPlan) -> None:
        """Take note of the plan of all rounds so far: removed layers change the numbers of the others."""
        self._dense = {now: key for key, now in plan.keys_after().items()}

    @property
    def requested_sparsity(self) -> float | None:
        """The requested fraction of the prunable parameters; `None` where the request has another kind of budget."""
        if self.config.has_budget_per_kind or not isinstance(self._budget.cost, ParameterCost):
            return None
        return self._budget.amount / sum(int(self._costs[key][-1]) for key in self._counted)

    def removed(self, kept: Mapping[SiteKey, int]) -> int:
        """Return the cost that is removed if sites keep these numbers of units, and the others all of theirs."""
        of_sites = (
            int(self._costs[key][-1] - self._costs[key][units]) if units else self._whole[key]
            for key, units in kept.items()
        )
        gone = {key for key, units in kept.items() if not units}
        left = {layer for layer, _ in self._costs.keys() - gone}
        return sum(of_sites) + sum(rest for layer, rest in self._rest.items() if layer not in left)

    def overshoot(self, plan: PruningPlan) -> float:
        """Return how many times the budget the plan of all rounds removes; 1 where the budget is nothing."""
        removed = self.removed({key: len(units) for key, units in plan.kept.items()})
        return removed / self._budget.amount if self._budget.amount > 0 else 1.0

    def request(self, sites: Sequence[Site], number: int) -> tuple[PruningConfig, Budget]:
        """Return the request and the budget of a round.

        Args:
            sites (sequence of `Site`): the sites of the model before the round.
            number (`int`): the number of the round, from 1.
        """
        config, budget = self.config, self._budget
        if config.rounds == 1:
            return config, budget
        config = self.with_states(number)
        counts = dict.fromkeys(self._costs, 0) | {self._dense[site.key]: site.num_units for site in sites}
        share = number / config.rounds
        is_last = number == config.rounds
        budget = replace(
            budget,
            amount=round(budget.amount * share),
            at_least=budget.at_least and is_last,
            # A round that rounds up could exceed the budget of all rounds.
            at_most=budget.at_least and not is_last,
            # All rounds together can meet the request. The rest for the last round may be less than half a step.
            as_far_as_possible=not (budget.at_least and is_last),
        )
        # Without its removed layers, a model has other pools.
        by_pool = self._left(sites, budget) if config.depth_kind is None else None
        budget = replace(budget, amount=max(0, budget.amount - self.removed(counts)), by_pool=by_pool)
        config = replace(config, **self._depth_fields(sites, share))
        if config.has_budget_per_kind:
            fields: dict[str, Any] = {
                f"{kind}_sparsity": self._sparsity(sites, kind, share) for kind in config.width_kinds
            }
            config = replace(config, **fields)
        return config, budget

    def with_states(self, number: int) -> PruningConfig:
        """Return the request of all rounds with the folder for the states of a round, where it names a folder."""
        if self.config.rounds == 1 or self.config.resume is None:
            return self.config
        return replace(self.config, resume=str(Path(self.config.resume) / f"round-{number}"))

    def _depth_fields(self, sites: Sequence[Site], share: float) -> dict[str, Any]:
        """Return the options of a round that depend on the layers that are left."""
        if self.config.depth_kind is None:
            return {}
        fields: dict[str, Any] = {}
        if self.config.skip_layers:
            layers = 1 + max(key.layer for key in self._costs)
            skipped = {layer % layers for layer in self.config.skip_layers}
            fields["skip_layers"] = sorted({now.layer for now, key in self._dense.items() if key.layer in skipped})
        if not self.config.depth_is_open:
            left = len(depth_units(sites, self.config.depth_kind))
            wanted = max(0, round(share * self._depth) - (self._depth_units - left)) / left
            fields["depth_sparsity" if self.config.unit_kinds else "sparsity"] = wanted
        return fields

    def _left(self, sites: Sequence[Site], budget: Budget) -> dict[int, tuple[int, int]]:
        """Return the part of `budget` that every pool has yet to lose, and the part of it that its heads have to lose.

        Units that all earlier rounds removed are subtracted, including those of sites that cannot lose more. If every
        round rounded its own part, no heads would ever be removed where a head costs more than twice this part.
        """
        removed: dict[int, dict[str, int]] = {pool: dict.fromkeys(UnitKind, 0) for pool in self._pools}
        for site in sites:
            if (pool := pool_of(site, self.config.resolved_scope)) in removed:
                removed[pool][site.kind] += self.removed({site.key: site.num_units})
        sizes = {pool: sum(of_kinds.values()) for pool, of_kinds in self._pools.items()}
        return {
            pool: (
                part - sum(removed[pool].values()),
                round(part * self._pools[pool][UnitKind.ATTENTION] / sizes[pool]) - removed[pool][UnitKind.ATTENTION],
            )
            for pool, part in budget.divided(sizes).items()
        }

    def _sparsity(self, sites: Sequence[Site], kind: str, share: float) -> float:
        """Return the sparsity of the open sites of a kind with which all its sites lose this share of the request."""
        present = {self._dense[site.key]: site.num_units for site in sites if site.kind == kind}
        total = sum(int(self._costs[key][-1]) for key in present)
        removed = self.removed(present)
        left = sum(site.num_parameters for site in self.open_sites(sites) if site.kind == kind)
        wanted = self.config.sparsity_of(kind) * share * total - removed
        return min(max(0.0, wanted / max(1, left)), ALMOST_ALL)

    def open_sites(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites whose units are still those of the dense model.

        The last query head of a KV group would be removed with its keys and values, which no plan with query heads as
        units can express.
        """
        return [
            site for site in sites if (site.num_groups, site.unit_parameters) == self._units[self._dense[site.key]]
        ]

    def keep(
        self,
        sites: Sequence[Site],
        scores: Mapping[SiteKey, torch.Tensor],
        config: PruningConfig,
        budget: Budget,
        additive: bool,
    ) -> dict[SiteKey, list[int]]:
        """Return the kept units of every site, after allocating a round's budget among the open sites."""
        open_sites = self.open_sites(sites)
        if config.depth_kind is not None:
            # A layer or sublayer can be removed whole even if single units of it cannot.
            is_open = {site.key for site in open_sites}
            open_sites = [site if site.key in is_open else replace(site, fixed=LAST_UNITS) for site in sites]
        values = {key: value.cpu() for key, value in scores.items()}
        kept = {site.key: list(range(site.num_units)) for site in sites}
        return kept | allocate(open_sites, values, config, budget, additive)
