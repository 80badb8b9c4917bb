"""The memory that a pruned model takes while it serves prompts, as the budget of `target_memory`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..allocation.budgets import Budget, OutOfReach
from ..allocation.constraints import named_constraints
from ..allocation.plan import PruningPlan
from ..architectures import Site, SiteKey
from ..architectures.positions import positions_of
from ..cutting.cut import Cut
from ..cutting.surgery import empty_pruned_model
from ..forward.memory import Memory, memory_of, simulated_memory
from ..loading.subject import Subject
from ..reconstruction.bias import kinds_gaining_bias
from ..request.choices import DepthKind, Scope, UnitKind
from ..request.config import PruningConfig
from ..runs.loggers import get_logger
from ..runs.progress import announce
from .settling import kept_by_equal_scores


logger = get_logger(__name__)

# The amount to remove is found to this share of the target, in at most so many steps. A step interpolates, and removes
# this share of the interval in addition, so that the model mostly fits into the target.
RESOLUTION, MOST_STEPS, SAFETY = 2e-3, 6, 1e-3

# A cache that takes a larger share of the memory is worth a hint at the units that shrink it.
LARGE_CACHE = 0.15
WHAT_SHRINKS = (
    "It shrinks with layers or sublayers (kinds with 'layer' or 'sublayer') and with attention (kinds with "
    "'attention'), where heads share keys and values with attention_unit='kv_group'."
)


@dataclass(frozen=True)
class MemoryCost:
    """The bytes of weights and KV cache that units take (see [`Cost`]).

    Args:
        item_size (`int`): bytes of a parameter.
        cache (`dict[int, int]`): bytes of the KV cache of every layer that has one.
        cache_per_unit (`dict[SiteKey, int]`): bytes of the KV cache of one unit; 0 where units share keys and values.
        dense (`int`): bytes that the dense model takes, with the activations of the pruned one.
        target (`int`): bytes that the pruned model may take.
    """

    item_size: int
    cache: dict[int, int]
    cache_per_unit: dict[SiteKey, int]
    dense: int
    target: int

    def of(self, site: Site, units: torch.Tensor) -> torch.Tensor:
        return units * (site.unit_parameters * self.item_size + self.cache_per_unit.get(site.key, 0))

    def total(self, site: Site) -> int:
        return int(self.of(site, torch.tensor(site.num_units)))

    def whole(self, gone: Collection[Site], sites: Collection[Site]) -> int:
        caches = sum(self.cache.get(site.layer, 0) for site in gone if site.kind == UnitKind.ATTENTION)
        return caches + sum(site.all_parameters for site in gone) * self.item_size

    def asked(self, amount: int, total: int) -> str:
        return f"target_memory={self.target:,}, which removes {amount / 1e6:,.1f} MB of weights and KV cache,"

    def most(self, amount: float, total: int) -> str:
        return f"saving is {amount / 1e6:,.1f} MB, for target_memory={self.dense - int(amount):,}"


class Serving:
    """Predicts the memory of pruned models of one model.

    Args:
        subject (`Subject`): the dense model with all its sites.
        config (`PruningConfig`): the request, with `context_tokens` and `serving_batch`.
        known (`dict`, *optional*): predictions for the same model, to which new ones are added.
    """

    def __init__(self, subject: Subject, config: PruningConfig, known: dict[Any, Memory] | None = None):
        self._subject, self._config = subject, config
        self._known = {} if known is None else known

    def memory(self, kept: Mapping[SiteKey, Sequence[int]]) -> Memory:
        """Return the memory of the model that keeps these units."""
        batch_size, tokens = self._config.serving_batch, self._config.context_tokens
        units = {key: list(of_site) for key, of_site in kept.items()}
        with_bias = kinds_gaining_bias(self._subject.sites, units, self._config.reconstruction)
        counts = tuple((key, len(of_site)) for key, of_site in sorted(units.items()))
        case = (counts, *sorted(with_bias), batch_size, tokens)
        if case not in self._known:
            # The skeleton has the default dtype.
            skeleton: Any = empty_pruned_model(self._subject, units, with_bias)
            skeleton = skeleton.to(self._subject.model.dtype).eval()
            self._known[case] = simulated_memory(skeleton, batch_size, tokens)
        return self._known[case]

    def budget(self) -> Budget:
        """Return the budget that `target_memory` requires.

        The activations depend on the widest layer. With `scope="layer"` they are those of the model that keeps as much
        as the target allows. With other scopes and with sublayers, where one layer may stay as it is, they are those
        of the dense model.

        Raises:
            OutOfReach: where the constraints do not allow the target; the message names the smallest possible one.
            ValueError: where the dense model takes no more than the target, or its memory cannot be predicted.
        """
        config, sites = self._config, self._subject.sites
        target = config.target_memory
        assert target is not None
        dense = self._dense()
        if dense.total <= target:
            raise ValueError(
                f"target_memory is {target:,} bytes, and the model takes only {dense.total:,} ({dense}), so that "
                f"nothing would be pruned. Choose a smaller target, or more context_tokens."
            )
        cost = self._cost(dense, target)
        most = _removing(dense.weights + dense.cache, cost, as_far_as_possible=True)
        kept = kept_by_equal_scores(sites, config, most)
        least = self._predicted(dense, kept)
        if least.total > target:
            raise OutOfReach(
                f"target_memory={target:,} is less than the model takes with "
                f"{', '.join(named_constraints(config, sites))}: the smallest possible target_memory is "
                f"{least.total:,} ({least}). {_what_shrinks(config, dense, cost)}"
            )
        # Amounts that are too small and large enough, with what they lead to. Between them, it is nearly linear.
        saved = dense.weights + dense.cache - least.weights - least.cache
        low, high, activations = (0, dense.total), (saved, least.total), least.activations
        for _ in range(MOST_STEPS):
            if target - high[1] <= RESOLUTION * target:
                break
            share = (low[1] - target) / (low[1] - high[1])
            middle = low[0] + math.ceil(min(share + SAFETY, 1.0) * (high[0] - low[0]))
            if middle >= high[0]:
                break
            kept = kept_by_equal_scores(sites, config, _removing(middle, cost, as_far_as_possible=True))
            memory = self._predicted(dense, kept)
            if memory.total <= target:
                high, activations = (middle, memory.total), memory.activations
            else:
                low = (middle, memory.total)
        # Other scores may remove units of other sizes, which must save as much. This may leave other layers wider, so
        # that the activations are larger.
        for _ in range(MOST_STEPS):
            budget = _removing(dense.weights + dense.cache + activations - target, cost)
            memory = self._predicted(dense, kept_by_equal_scores(sites, config, budget))
            if memory.total <= target:
                break
            activations = max(activations, memory.activations)
        return budget

    def warn_of_context(self) -> None:
        """Warn of a context that the model has no positions for, and of a large KV cache that will stay."""
        config, dense = self._config, self._dense()
        positions = positions_of(self._subject.model.config)
        if positions is not None and config.context_tokens > positions:
            logger.warning(
                "context_tokens is %s, and the model has %s positions.", f"{config.context_tokens:,}", f"{positions:,}"
            )
        if dense.cache > LARGE_CACHE * dense.total and not _shrinks_cache(config, self._cost(dense, 0)):
            logger.warning(
                "The KV cache takes %s of the %s MB of the dense model, and the units of this request do not shrink "
                "it. %s",
                f"{dense.cache / 1e6:,.0f}",
                f"{dense.total / 1e6:,.0f}",
                WHAT_SHRINKS,
            )

    def _dense(self) -> Memory:
        return self.memory({site.key: range(site.num_units) for site in self._subject.sites})

    def _predicted(self, dense: Memory, kept: Mapping[SiteKey, Sequence[int]]) -> Memory:
        memory = self.memory(kept)
        # Layers have the same activations whatever the scores are, and sublayers have not.
        if self._config.resolved_scope == Scope.LAYER and self._config.depth_kind in (None, DepthKind.LAYER):
            return memory
        return Memory(memory.weights, memory.caches, dense.activations)

    def _cost(self, dense: Memory, target: int) -> MemoryCost:
        """Return the cost of sites; what a unit takes of the KV cache is found by removing some."""
        sites = self._subject.sites
        attention = [site for site in sites if site.kind == UnitKind.ATTENTION]
        # One unit of every group; a site that cannot lose it keeps it.
        fewer = {
            site.key: [unit for unit in range(site.num_units) if (unit + 1) % (site.num_units // site.num_groups)]
            for site in attention
            if not site.fixed and site.num_units > site.num_groups
        }
        kept = {site.key: list(range(site.num_units)) for site in sites} | fewer
        after = self.memory(kept)
        per_unit = {
            site.key: (before - left) // (site.num_units - len(kept[site.key])) if site.key in fewer else 0
            for site, before, left in zip(attention, dense.caches, after.caches)
        }
        caches = {site.layer: size for site, size in zip(attention, dense.caches)}
        item_size = sites[0].projection.weight.element_size()
        return MemoryCost(item_size, caches, per_unit, dense.total, target)


def with_memory(done: Cut, config: PruningConfig) -> PruningPlan:
    """Return the plan of a pruned model with the memory that the model takes in its metadata, which is logged too."""
    memory = memory_of(done.model, config.serving_batch, config.context_tokens)
    announce(
        f"The pruned model takes {memory}, with {config.serving_batch} x {config.context_tokens} tokens; "
        f"target_memory is {(config.target_memory or 0) / 1e6:,.0f} MB."
    )
    parts = {"weights": memory.weights, "cache": memory.cache, "activations": memory.activations}
    return replace(done.plan, metadata={**done.plan.metadata, "memory": parts})


def _removing(amount: int, cost: MemoryCost, as_far_as_possible: bool = False) -> Budget:
    return Budget(amount, at_least=True, cost=cost, as_far_as_possible=as_far_as_possible)


def _what_shrinks(config: PruningConfig, dense: Memory, cost: MemoryCost) -> str:
    """Return which kinds of units would shrink the KV cache, if the request has none of them."""
    if _shrinks_cache(config, cost):
        return "Choose a larger target, or fewer context_tokens."
    return f"The KV cache takes {dense.cache / 1e6:,.1f} MB of the dense model. {WHAT_SHRINKS}"


def _shrinks_cache(config: PruningConfig, cost: MemoryCost) -> bool:
    """Whether a request has units whose removal shrinks the KV cache."""
    in_attention = UnitKind.ATTENTION in config.resolved_kinds and any(cost.cache_per_unit.values())
    return config.depth_kind is not None or in_attention
