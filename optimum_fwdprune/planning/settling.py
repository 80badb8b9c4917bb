"""Settling a request for a model before any work: defaults that depend on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ..allocation.allocate import allocate
from ..allocation.budgets import Budget, OutOfReach
from ..allocation.constraints import prunable_sites, spares_ends
from ..architectures import (
    Site,
    SiteKey,
)
from ..request.choices import DepthKind, Scope, UnitKind
from ..request.config import PruningConfig
from ..runs.loggers import get_logger


logger = get_logger(__name__)

# Where the defaults would remove a larger fraction of the layers and kinds that they prune, others are pruned too.
MOST_BY_DEFAULT = 0.9

# Returns a request, adapted to the model, and its budget.
BudgetOf = Callable[[PruningConfig], tuple[PruningConfig, Budget]]


def settle(
    sites: Sequence[Site],
    config: PruningConfig,
    budget_of: BudgetOf,
    check: Callable[[PruningConfig], None] = lambda _config: None,
    may_remove_layers: bool = True,
) -> tuple[PruningConfig, Budget]:
    """Return the request with the defaults that depend on the model filled in, and its budget; log what is pruned in
    addition to the defaults. The arguments and errors are those of [`settled_request`]."""
    settled, budget, message = settled_request(sites, config, budget_of, check, may_remove_layers)
    for line in message:
        logger.warning(line)
    return settled, budget


def settled_request(
    sites: Sequence[Site],
    config: PruningConfig,
    budget_of: BudgetOf,
    check: Callable[[PruningConfig], None] = lambda _config: None,
    may_remove_layers: bool = True,
) -> tuple[PruningConfig, Budget, list[str]]:
    """Return the request with the defaults that depend on the model filled in, its budget, and what is pruned in
    addition to the defaults.

    Where the MLP channels of the inner layers cannot meet the budget, or would lose more than `MOST_BY_DEFAULT` of
    their parameters, the first and last layers are pruned too, and after that query heads. Where these cannot meet the
    budget either, as few whole layers as possible are removed. Each of these steps is taken only where `skip_layers`
    or `kinds` are not set.

    Args:
        sites (sequence of `Site`): sites of the dense model.
        config (`PruningConfig`): the request.
        budget_of (`Callable`): returns a request with its constraints adapted, and its budget, from a request.
        check (`Callable`): raises `ValueError` where the model does not allow a request.
        may_remove_layers (`bool`, defaults to `True`): whether layers can be scored where the request does not name
            them.

    Raises:
        OutOfReach: where the constraints do not allow the budget; the message names them and the largest budget, and
            layers as the way out where their removal could meet it.
        ValueError: where `check` raises it.
    """
    met: tuple[PruningConfig, Budget, list[str]] | None = None
    out_of_reach: OutOfReach | None = None
    widest = config
    for place, (candidate, message) in enumerate(_candidates(sites, config)):
        try:
            check(candidate)
        except ValueError:
            if place == 0:
                raise
            break
        widest = candidate
        try:
            settled, budget = budget_of(candidate)
            kept = kept_by_equal_scores(sites, settled, budget)
        except OutOfReach as error:
            out_of_reach = error
            continue
        met = settled, budget, message
        if _share(sites, settled, budget, kept) <= MOST_BY_DEFAULT:
            break
    if met is None:
        assert out_of_reach is not None
        with_layers = _with_layers(sites, widest, budget_of, check) if may_remove_layers else None
        if with_layers is None:
            raise out_of_reach
        if config.kinds is not None:
            raise OutOfReach(f"{out_of_reach} {_way_out(with_layers[0])}") from out_of_reach
        met = *with_layers, [*message, _LAYERS_TOO]
    return met


_LAYERS_TOO = (
    "The budget is too large for heads and channels: whole layers are removed too, as few as possible. Set kinds to "
    "choose yourself what is pruned."
)


def kept_by_equal_scores(sites: Sequence[Site], config: PruningConfig, budget: Budget) -> dict[SiteKey, list[int]]:
    """Return the units that a request would keep if all had the same score; whether it can be met does not depend on
    scores."""
    equal_scores = {site.key: torch.zeros(site.num_units, dtype=torch.float32) for site in sites}
    return allocate(list(sites), equal_scores, config, budget)


def _with_layers(
    sites: Sequence[Site], config: PruningConfig, budget_of: BudgetOf, check: Callable[[PruningConfig], None]
) -> tuple[PruningConfig, Budget] | None:
    """Return the request with as few whole layers removed as its budget requires, and this budget; `None` where they
    cannot be removed, or cannot meet it."""
    if not config.width_kinds or config.depth_kind is not None or config.has_budget_per_kind:
        return None
    layers = 1 + max(site.layer for site in sites)
    # The number of layers is left to the allocation where it may choose it.
    is_open = config.has_target or config.scope == Scope.SEARCH
    for share in [None] if is_open else [number / layers for number in range(1, layers)]:
        kinds = [*config.resolved_kinds, DepthKind.LAYER]
        try:
            candidate = replace(config, kinds=kinds, depth_sparsity=share)
            check(candidate)
            settled, budget = budget_of(candidate)
            kept_by_equal_scores(sites, settled, budget)
        except OutOfReach:
            continue
        except ValueError:
            # The method or the family allows no layers.
            return None
        return settled, budget
    return None


def _way_out(config: PruningConfig) -> str:
    share = "" if config.depth_sparsity is None else f" and depth_sparsity={config.depth_sparsity:.3g}"
    return f"It can be met by removing whole layers too: kinds={[str(kind) for kind in config.resolved_kinds]}{share}."


def _candidates(sites: Sequence[Site], config: PruningConfig) -> Iterator[tuple[PruningConfig, list[str]]]:
    """Yield the request, then requests with fewer default restrictions, each with the warnings to log for it."""
    message: list[str] = []
    yield config, message
    if spares_ends(config, 1 + max(site.layer for site in sites)):
        config = replace(config, skip_layers=[])
        message = [
            "The budget is too large for the inner layers alone: the first and last two layers, which are unpruned by "
            "default, are pruned too. Set skip_layers to choose the layers yourself."
        ]
        yield config, message
    has_attention = any(site.kind == UnitKind.ATTENTION and not site.fixed for site in sites)
    if config.kinds is None and config.width_kinds and not config.has_budget_per_kind and has_attention:
        message = [
            *message,
            "The budget is too large for the MLP channels alone: attention heads, which are unpruned by default, are "
            "pruned too. Set kinds to choose yourself what is pruned.",
        ]
        yield replace(config, kinds=[UnitKind.ATTENTION, UnitKind.MLP]), message


def _share(sites: Sequence[Site], config: PruningConfig, budget: Budget, kept: Mapping[SiteKey, list[int]]) -> float:
    """Return the fraction of the cost of heads and channels that the budget removes, in layers that are kept."""
    if config.has_budget_per_kind:
        return max((config.sparsity_of(kind) for kind in config.width_kinds), default=0.0)
    open_sites = [site for site in prunable_sites(sites, config) if kept[site.key]]
    open_cost = sum(budget.cost.total(site) for site in open_sites)
    left = sum(int(budget.cost.of(site, torch.tensor([len(kept[site.key])]))) for site in open_sites)
    return 1 - left / open_cost if open_cost else 0.0
