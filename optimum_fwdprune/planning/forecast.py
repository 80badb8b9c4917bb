"""A forecast of the result of a request, before any work, and warnings where the result is not what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..allocation.budgets import Budget, counted_sites
from ..allocation.constraints import prunable_sites
from ..allocation.depth import depth_units, number_removed
from ..allocation.losses import losses_by_kind, outside_units
from ..allocation.plan import PruningPlan
from ..allocation.widths import channel_multiple, named_multiples
from ..architectures import Site, SiteKey
from ..request.choices import Scope, UnitKind
from ..request.config import PruningConfig
from ..runs.loggers import get_logger
from .settling import kept_by_equal_scores


logger = get_logger(__name__)

# A warning is logged where rounding to whole units misses a sparsity by a larger fraction of it.
FAR_OFF = 0.05


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
        prunable (`int`): parameters that units own before pruning.
    """

    parameters: int
    bytes: int
    removed_parameters: int
    removed_bytes: int
    added_parameters: int
    losses: dict[str, str]
    removed_by_kind: dict[str, int]
    prunable: int

    @property
    def parameters_after(self) -> int:
        """Parameters of the pruned model."""
        return self.parameters - self.removed_parameters + self.added_parameters

    @property
    def bytes_after(self) -> int:
        """Size of its weights."""
        item_size = self.removed_bytes // self.removed_parameters if self.removed_parameters else 0
        return self.bytes - self.removed_bytes + item_size * self.added_parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON values: `parameters`, `prunable` and `bytes` (`before`, `after` and `change`)."""
        left = self.prunable - self.removed_parameters
        sizes = {
            "parameters": (self.parameters, self.parameters_after),
            "prunable": (self.prunable, left),
            "bytes": (self.bytes, self.bytes_after),
        }
        changes = {
            name: {"before": before, "after": after, "change": after / before - 1 if before else 0.0}
            for name, (before, after) in sizes.items()
        }
        outside = outside_units(self.parameters, self.prunable)
        return {**changes, "outside": outside, "removed": [*self.losses.values()]}

    def __str__(self) -> str:
        parameters, size = self.parameters_after, self.bytes_after
        share = 1 - parameters / self.parameters
        return "\n".join(
            [
                f"The pruned model will have {_written(parameters)} of {_written(self.parameters)} parameters "
                f"({-share:+.1%}) and {size / 1e6:,.1f} of {self.bytes / 1e6:,.1f} MB of weights.",
                *filter(None, [outside_units(self.parameters, self.prunable)]),
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
    kept = kept_by_equal_scores(sites, config, budget)
    losses = _losses(sites, config, kept, _removed_by_site(sites, kept))
    return _sized(sites, kept, losses, (parameters, size, added_parameters))


def forecast_of_plan(
    sites: Sequence[Site], plan: PruningPlan, parameters: int, size: int, added_parameters: int
) -> Forecast:
    """Return a forecast of the sizes after a plan is replayed; the arguments are those of [`forecast`]."""
    losses = losses_by_kind(plan.kept, plan.num_units, plan.attention_unit)
    return _sized(sites, plan.kept, losses, (parameters, size, added_parameters))


def _sized(
    sites: Sequence[Site],
    kept: Mapping[SiteKey, Sequence[int]],
    losses: dict[str, str],
    sizes: tuple[int, int, int],
) -> Forecast:
    """Return a forecast; `sizes` are parameters and bytes of the dense model, and the parameters that are added."""
    (parameters, size, added), by_site = sizes, _removed_by_site(sites, kept)
    removed = sum(by_site.values())
    item_size = sites[0].weight.element_size()
    by_kind: dict[str, int] = {
        kind: sum(by_site[site.key] for site in sites if site.kind == kind) for kind in UnitKind
    }
    prunable = sum(site.num_parameters for site in sites)
    return Forecast(parameters, size, removed, removed * item_size, added, losses, by_kind, prunable)


def _removed_by_site(sites: Sequence[Site], kept: Mapping[SiteKey, Sequence[int]]) -> dict[SiteKey, int]:
    """Return the parameters that every site loses."""
    return {
        site.key: (site.num_units - len(kept[site.key])) * site.unit_parameters
        if kept[site.key]
        else site.all_parameters
        for site in sites
    }


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
            _why_rounded(sites, config),
        )
        return
    for field, asked, removed in _sparsities(sites, config, budget, outcome):
        if abs(removed - asked) > FAR_OFF * asked:
            logger.warning(
                "%s=%.4g becomes %.4g for this model, because %s. Choose another %s, or relax these constraints.",
                field,
                asked,
                removed,
                _why_rounded(sites, config),
                field,
            )


def warn_of_overshoot(config: PruningConfig, times: float) -> None:
    """Warn where removed layers or sublayers alone are more than the whole budget, of which heads and channels give
    the rest otherwise.

    Args:
        config (`PruningConfig`): the request.
        times (`float`): how many times its budget the plan removes.
    """
    if config.unit_kinds and config.depth_sparsity and not config.has_budget_per_kind and times > 1 + FAR_OFF:
        logger.warning(
            "The %ss that depth_sparsity=%.4g removes are %.2f times the whole budget, so that no other units are "
            "removed, and the model becomes smaller than requested. Lower depth_sparsity, or raise the budget.",
            config.depth_kind,
            config.depth_sparsity,
            times,
        )


def _sparsities(
    sites: Sequence[Site], config: PruningConfig, budget: Budget, outcome: Forecast
) -> Iterator[tuple[str, float, float]]:
    """Yield every sparsity of a request: its field, its requested value, and the forecast value."""
    prunable: dict[str, int] = {
        kind: sum(site.num_parameters for site in sites if site.kind == kind) for kind in UnitKind
    }
    if config.has_budget_per_kind:
        # Removed layers take experts with them.
        experts = [UnitKind.EXPERT] if config.prunes_experts and config.depth_kind is None else []
        for kind in [*config.width_kinds, *experts]:
            if prunable[kind]:
                removed = outcome.removed_by_kind[kind] / prunable[kind]
                yield config.field_of(kind), config.sparsity_of(kind), removed
    elif config.depth_kind is not None and not config.unit_kinds:
        total = len(depth_units(sites, config.depth_kind))
        if not budget.at_least:
            yield "sparsity", config.sparsity, number_removed(sites, config) / total
    elif not budget.at_least and config.depth_kind is None:
        counted = sum(site.num_parameters for site in counted_sites(sites, config))
        yield "sparsity", config.sparsity, outcome.removed_parameters / counted


def _why_rounded(sites: Sequence[Site], config: PruningConfig) -> str:
    reasons = ["units are removed whole"]
    sites = prunable_sites(sites, config)
    if options := named_multiples(sites, config):
        multiple = channel_multiple(sites, config)
        widths = f"MLP widths are multiples of {multiple}" if multiple > 1 else "heads are removed in steps"
        reasons.append(f"{widths} ({', '.join(options)})")
    if config.cuts_alike:
        reasons.append(f"{config.alike_by} cuts every layer alike")
    if config.prunes_experts:
        reasons.append("every layer, and every group of its experts, loses the same number")
    return " and ".join(reasons)


def _losses(
    sites: Sequence[Site], config: PruningConfig, kept: Mapping[SiteKey, list[int]], by_site: Mapping[SiteKey, int]
) -> dict[str, str]:
    depth = _depth_losses(sites, config, kept)
    num_units = {site.key: site.num_units for site in sites}
    by_kind = losses_by_kind(kept, num_units, config.attention_unit)
    if config.prunes_experts and UnitKind.EXPERT in by_kind:
        depth |= {UnitKind.EXPERT: by_kind[UnitKind.EXPERT]}
    if not config.width_kinds:
        return depth
    if config.resolved_scope == Scope.LAYER and config.depth_kind is None:
        return by_kind
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
