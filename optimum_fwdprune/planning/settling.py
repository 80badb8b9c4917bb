"""Settling a request for a model before any work: defaults that depend on the model, and a forecast of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..allocation.allocate import allocate
from ..allocation.budgets import Budget, OutOfReach
from ..allocation.constraints import prunable_sites, spares_ends
from ..allocation.depth import depth_units, number_removed
from ..allocation.losses import losses_by_kind
from ..architectures import (
    Site,
    SiteKey,
)
from ..request.choices import DepthKind, Layout, Scope, UnitKind
from ..request.config import PruningConfig
from ..runs.loggers import get_logger


logger = get_logger(__name__)

# Where the defaults would remove a larger fraction of the layers and kinds that they prune, others are pruned too.
MOST_BY_DEFAULT = 0.9

# A warning is logged where rounding to whole units misses a sparsity by a larger fraction of it.
FAR_OFF = 0.05

# Returns a request, adapted to the model, and its budget.
BudgetOf = Callable[[PruningConfig], tuple[PruningConfig, Budget]]


def settle(
    sites: Sequence[Site],
    config: PruningConfig,
    budget_of: BudgetOf,
    check: Callable[[PruningConfig], None] = lambda _config: None,
    may_remove_layers: bool = True,
) -> tuple[PruningConfig, Budget]:
    """Return the request with the defaults that depend on the model filled in, and its budget.

    Where the MLP channels of the inner layers cannot meet the budget, or would lose more than `MOST_BY_DEFAULT` of
    their parameters, the first and last layers are pruned too, and after that query heads. Where these cannot meet the
    budget either, as few whole layers as possible are removed. Each of these steps is logged, and taken only where
    `skip_layers` or `kinds` are not set.

    Args:
        sites (sequence of `Site`): sites of the dense model.
        config (`PruningConfig`): the request.
        budget_of (`Callable`): returns a request with its constraints adapted, and its budget, from a request.
        check (`Callable`): raises `ValueError` where the model does not allow a request.
        may_remove_layers (`bool`, defaults to `True`): whether layers can be scored, if the request does not name them.

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
            kept = _kept(sites, settled, budget)
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
    settled, budget, message = met
    for line in message:
        logger.warning(line)
    return settled, budget


_LAYERS_TOO = (
    "The budget is too large for heads and channels: whole layers are removed too, as few as possible. Set kinds to "
    "choose yourself what is pruned."
)


def _kept(sites: Sequence[Site], config: PruningConfig, budget: Budget) -> dict[SiteKey, list[int]]:
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
            _kept(sites, settled, budget)
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


def _share(
    sites: Sequence[Site], config: PruningConfig, budget: Budget, kept: Mapping[SiteKey, list[int]]
) -> float:
    """Return the fraction of the cost of heads and channels that the budget removes, in layers that are kept."""
    if config.has_budget_per_kind:
        return max(config.sparsity_of(kind) for kind in config.width_kinds)
    open_sites = [site for site in prunable_sites(sites, config) if kept[site.key]]
    open_cost = sum(budget.cost.total(site) for site in open_sites)
    left = sum(int(budget.cost.of(site, torch.tensor([len(kept[site.key])]))) for site in open_sites)
    return 1 - left / open_cost if open_cost else 0.0


@dataclass(frozen=True)
class Forecast:
    """A forecast of the sizes after a pruning.

    Args:
        parameters (`int`): parameters of the model before pruning.
        bytes (`int`): size of its weights before pruning.
        removed_parameters (`int`): parameters that will be removed.
        removed_bytes (`int`): bytes that will be removed.
        added_parameters (`int`): biases that the reconstruction will add.
        losses (`dict[str, str]`): a sentence on every kind of units.
        removed_by_kind (`dict[str, int]`): parameters that will be removed, by kind.
    """

    parameters: int
    bytes: int
    removed_parameters: int
    removed_bytes: int
    added_parameters: int
    losses: dict[str, str]
    removed_by_kind: dict[str, int]

    def __str__(self) -> str:
        parameters = self.parameters - self.removed_parameters + self.added_parameters
        item_size = self.removed_bytes / self.removed_parameters if self.removed_parameters else 0
        size = self.bytes - self.removed_bytes + item_size * self.added_parameters
        share = 1 - parameters / self.parameters
        return "\n".join(
            [
                f"The pruned model will have {_written(parameters)} of {_written(self.parameters)} parameters "
                f"({-share:+.1%}) and {size / 1e6:,.1f} of {self.bytes / 1e6:,.1f} MB of weights.",
                *self.losses.values(),
            ]
        )


def forecast(
    sites: Sequence[Site], config: PruningConfig, budget: Budget, parameters: int, size: int, added_parameters: int
) -> Forecast:
    """Return a forecast of the sizes after a settled request.

    Args:
        sites (sequence of `Site`): sites of the dense model.
        config (`PruningConfig`): the settled request.
        budget (`Budget`): its budget.
        parameters (`int`): parameters of the dense model.
        size (`int`): size of its weights in bytes.
        added_parameters (`int`): biases that the reconstruction will add.
    """
    kept = _kept(sites, config, budget)
    by_site = {
        site.key: (site.num_units - len(kept[site.key])) * site.unit_parameters
        if kept[site.key]
        else site.all_parameters
        for site in sites
    }
    removed = sum(by_site.values())
    item_size = sites[0].projection.weight.element_size()
    losses = _losses(sites, config, kept, by_site)
    by_kind: dict[str, int] = {
        kind: sum(by_site[site.key] for site in sites if site.kind == kind) for kind in UnitKind
    }
    return Forecast(parameters, size, removed, removed * item_size, added_parameters, losses, by_kind)


def warn_of_rounding(sites: Sequence[Site], config: PruningConfig, budget: Budget, outcome: Forecast) -> None:
    """Warn where rounding to whole units removes nothing, or leads to a sparsity far from the requested one.

    Args:
        sites (sequence of `Site`): sites of the dense model.
        config (`PruningConfig`): the settled request.
        budget (`Budget`): its budget.
        outcome (`Forecast`): the forecast.
    """
    if budget.amount > 0 and outcome.removed_parameters == 0:
        logger.warning(
            "This request removes nothing, because %s, and the budget is less than half of the smallest step that "
            "this allows. Raise the budget, or relax these constraints.",
            _why_rounded(config),
        )
        return
    for field, asked, removed in _sparsities(sites, config, budget, outcome):
        if abs(removed - asked) > FAR_OFF * asked:
            logger.warning(
                "%s=%.4g becomes %.4g for this model, because %s. Choose another %s, or relax these constraints.",
                field,
                asked,
                removed,
                _why_rounded(config),
                field,
            )


def _sparsities(
    sites: Sequence[Site], config: PruningConfig, budget: Budget, outcome: Forecast
) -> Iterator[tuple[str, float, float]]:
    """Yield every sparsity of a request: its field, its requested value, and the forecast value."""
    prunable: dict[str, int] = {
        kind: sum(site.num_parameters for site in sites if site.kind == kind) for kind in UnitKind
    }
    if config.has_budget_per_kind:
        for kind in config.width_kinds:
            if prunable[kind]:
                removed = outcome.removed_by_kind[kind] / prunable[kind]
                yield config.field_of(kind), config.sparsity_of(kind), removed
    elif config.depth_kind is not None and not config.width_kinds:
        total = len(depth_units(sites, config.depth_kind))
        if not budget.at_least:
            yield "sparsity", config.sparsity, number_removed(sites, config) / total
    elif not budget.at_least and config.depth_kind is None:
        yield "sparsity", config.sparsity, outcome.removed_parameters / sum(prunable.values())


def _why_rounded(config: PruningConfig) -> str:
    reasons = ["units are removed whole"]
    if config.multiple_of > 1 and UnitKind.MLP in config.resolved_kinds:
        reasons.append(f"MLP widths are rounded to multiple_of={config.multiple_of}")
    if config.layout == Layout.STOCK:
        reasons.append("layout='stock' cuts every layer alike")
    return " and ".join(reasons)


def _losses(
    sites: Sequence[Site], config: PruningConfig, kept: Mapping[SiteKey, list[int]], by_site: Mapping[SiteKey, int]
) -> dict[str, str]:
    depth = _depth_losses(sites, config, kept)
    if not config.width_kinds:
        return depth
    if config.resolved_scope == Scope.LAYER and not depth:
        return losses_by_kind(kept, {site.key: site.num_units for site in sites}, config.attention_unit)
    # How much each layer loses depends on the scores.
    open_sites = prunable_sites(sites, config)
    named: dict[str, str] = {UnitKind.ATTENTION: "attention heads", UnitKind.MLP: "MLP channels"}
    names = " and ".join(named[kind] for kind in sorted({site.kind for site in open_sites}))
    total = sum(site.num_parameters for site in open_sites)
    share = sum(by_site[site.key] for site in open_sites if kept[site.key]) / max(1, total)
    average = f"On average {share:.1%} of the parameters of {names} will be removed"
    if config.resolved_scope == Scope.LAYER:
        return depth | {"all": f"{average} in the other layers."}
    return depth | {
        "all": f"{average}. Layers compete for the budget (scope={config.resolved_scope!r}), so the scores decide how "
        f"much each layer loses."
    }


def _depth_losses(sites: Sequence[Site], config: PruningConfig, kept: Mapping[SiteKey, list[int]]) -> dict[str, str]:
    if config.depth_kind is None:
        return {}
    units = depth_units(sites, config.depth_kind)
    gone = sum(not any(kept[site.key] for site in unit.sites) for unit in units)
    if config.resolved_scope == Scope.SEARCH and config.depth_is_open:
        return {"depth": f"The search decides which of the {len(units)} {config.depth_kind}s are removed."}
    return {"depth": f"{gone} of {len(units)} {config.depth_kind}s are removed; the scores determine which."}


def _written(number: int) -> str:
    return f"{number / 1e6:,.1f} million" if number >= 10**6 else f"{number:,}"
