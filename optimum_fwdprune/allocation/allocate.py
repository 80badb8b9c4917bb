"""The allocation: kept units from scores and a budget, as pure functions that depend on no model and no method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from ..architectures import (
    Site,
    SiteKey,
)
from ..request.choices import BudgetSharing, Scope, UnitKind
from ..request.config import PruningConfig
from .budgets import (
    Budget,
    OutOfReach,
    ParameterCost,
)
from .constraints import named_constraints, prunable_sites
from .depth import DepthUnit, open_units, removed_units
from .experts import kept_experts
from .steps import Steps, scores_alike
from .widths import channel_multiple


def allocate(
    sites: list[Site],
    scores: Mapping[SiteKey, torch.Tensor],
    config: PruningConfig,
    budget: Budget,
    additive: bool = True,
) -> dict[SiteKey, list[int]]:
    """Choose the units that are kept.

    Within a site, units with the lowest scores are removed first. With `scope="layer"` every layer loses the same
    share of its parameters, or up to a step of `multiple_of` more or less if the total is then closer to the budget.
    With `"global"` all layers compete. With `budget="separate"` attention and MLP both lose their share; MLP channels,
    which are small, make up for the rounding to whole heads. With `"joint"` both compete. `attention_sparsity` and
    `mlp_sparsity` are two separate budgets. Layers and sublayers are removed first, and heads and channels of the
    other layers meet the rest of the budget. If the request leaves open how many layers or sublayers are removed, as
    few are removed as the budget allows. Of experts, every layer loses the same number; heads and channels come after
    them.

    Args:
        sites (`list[Site]`): every site of the model.
        scores (mapping of site key to `Tensor[num_units]`): units with higher scores are kept. Layers and sublayers
            have their own keys ([`DepthUnit`]).
        config (`PruningConfig`): scope, budgets and constraints.
        budget (`Budget`): how much to remove, in parameters or another cost.
        additive (`bool`): whether units of different sites are ranked by score per cost rather than by score.

    Returns:
        `dict`: site key to sorted kept unit indices, for every site.

    Raises:
        OutOfReach: where the constraints do not allow the budget. The message names them and the largest sparsity.
    """
    if config.depth_kind is None:
        return _without_single_units(sites, scores, config, budget, additive)
    if not config.depth_is_open:
        return _without_units(removed_units(sites, scores, config, budget), sites, scores, config, budget, additive)
    out_of_reach: OutOfReach | None = None
    for number in range(len(open_units(sites, config)) + 1):
        try:
            gone = removed_units(sites, scores, config, budget, number)
        except OutOfReach as error:
            out_of_reach = out_of_reach or error
            break
        try:
            return _without_units(gone, sites, scores, config, budget, additive)
        except OutOfReach as error:
            # The more of them go, the larger is the budget that can be met.
            out_of_reach = error
    assert out_of_reach is not None
    raise out_of_reach


def _without_units(
    units: Iterable[DepthUnit],
    sites: Sequence[Site],
    scores: Mapping[SiteKey, torch.Tensor],
    config: PruningConfig,
    budget: Budget,
    additive: bool,
) -> dict[SiteKey, list[int]]:
    """Let the units that are left beside removed layers or sublayers give the rest of the budget."""
    gone = {site.key: site for unit in units for site in unit.sites}
    spent = budget.cost.whole(gone.values(), sites)
    kept: dict[SiteKey, list[int]] = {key: [] for key in gone}
    left = [site for site in sites if site.key not in gone]
    if not config.unit_kinds:
        return kept | {site.key: list(range(site.num_units)) for site in left}
    rest = replace(budget, amount=max(0, budget.amount - spent), spent=spent)
    return kept | _without_single_units(left, scores, config, rest, additive)


def _without_single_units(
    sites: list[Site], scores: Mapping[SiteKey, torch.Tensor], config: PruningConfig, budget: Budget, additive: bool
) -> dict[SiteKey, list[int]]:
    """Choose the experts that stay, and then the heads and channels."""
    if not config.prunes_experts:
        return _narrowed(sites, scores, config, budget, additive)
    experts, rest = kept_experts(sites, scores, config, budget)
    others = [site for site in sites if site.key not in experts]
    if not config.width_kinds:
        return experts | {site.key: list(range(site.num_units)) for site in others}
    return experts | _narrowed(others, scores, config, rest, additive)


def _narrowed(
    sites: list[Site], scores: Mapping[SiteKey, torch.Tensor], config: PruningConfig, budget: Budget, additive: bool
) -> dict[SiteKey, list[int]]:
    """Choose the heads and channels that stay; the arguments are those of `allocate`."""
    cost, open_sites = budget.cost, prunable_sites(sites, config)
    if config.cuts_alike:
        scores = scores_alike(open_sites, scores)
    steps = {site.key: Steps(site, scores[site.key], config, additive, cost) for site in open_sites}
    if config.has_budget_per_kind:
        parts = []
        for kind in config.width_kinds:
            of_kind = sum(site.num_parameters for site in sites if site.kind == kind)
            part = Budget(
                round(config.sparsity_of(kind) * of_kind),
                cost=ParameterCost(kind, config.field_of(kind)),
                as_far_as_possible=budget.as_far_as_possible,
            )
            parts.append(([key for key in steps if key.kind == kind], part, of_kind))
    else:
        parts = [(list(steps), budget, budget.spent + budget.beside + sum(cost.total(site) for site in sites))]

    cuts = dict.fromkeys(steps, 0)
    for keys, part, total in parts:
        pools = _pools([steps[key] for key in keys], part, config.resolved_scope)
        _check_reachable(pools, part, total, config, sites)
        makes_up = _makes_up(part, config, [steps[key].site for key in keys])
        surplus = 0
        for pool, target in pools:
            left = _fill(pool, replace(target, amount=target.amount - surplus), cuts, config.budget, makes_up)
            surplus = left if makes_up else 0
    return {
        site.key: steps[site.key].kept(cuts[site.key]) if site.key in steps else list(range(site.num_units))
        for site in sites
    }


def _makes_up(part: Budget, config: PruningConfig, sites: Sequence[Site]) -> bool:
    """Return whether a pool makes up for the rounding of the pools before it.

    If every layer rounded up, the total would exceed its target once per layer. If MLP widths are multiples, all
    layers of a shape would round in the same direction.
    """
    if config.cuts_alike:
        return False
    return part.at_least or (channel_multiple(sites, config) > 1 and not part.at_most)


# Sites that compete, and their budget.
_Pool = tuple[list[Steps], Budget]


def pool_of(site: Site, scope: str) -> int:
    """Return the key of the pool that the site competes in: one per layer, or one for all."""
    return site.layer if scope == Scope.LAYER else 0


def _pools(steps: list[Steps], budget: Budget, scope: str) -> list[_Pool]:
    """Divide the budget among the pools."""
    pools: dict[int, list[Steps]] = {}
    for step in steps:
        pools.setdefault(pool_of(step.site, scope), []).append(step)
    if budget.by_pool is not None:
        parts = ((pool, *budget.by_pool[key]) for key, pool in pools.items())
        return [(pool, replace(budget, amount=amount, heads=heads)) for pool, amount, heads in parts]
    amounts = budget.divided({key: _prunable(pool) for key, pool in pools.items()})
    return [(pool, replace(budget, amount=amounts[key])) for key, pool in pools.items()]


def _prunable(pool: list[Steps]) -> int:
    return sum(step.total for step in pool)


def _check_reachable(
    pools: list[_Pool], part: Budget, total: int, config: PruningConfig, sites: Sequence[Site]
) -> None:
    """Raise `OutOfReach` where a pool cannot lose its share of `part`, and name the largest share for all pools."""
    shares = []
    for pool, target in pools:
        removable = sum(step.removable() for step in pool)
        smallest = min((int(step.costs.min()) for step in pool if len(step.costs)), default=0)
        slack = 0 if target.at_least else smallest // 2
        if target.amount > removable + slack:
            shares.append((removable / target.amount, pool[0].site.layer))
    if part.as_far_as_possible or (not shares and (pools or part.amount == 0)):
        return
    # All pools lose the same share, which is limited by the pool that can lose least.
    share, layer = min(shares, default=(0.0, 0))
    where = f"layer {layer}" if config.resolved_scope == Scope.LAYER and shares else "the model"
    asked, most = part.spent + part.amount, part.spent + share * part.amount
    raise OutOfReach(
        f"{part.cost.asked(asked, total)} is more than {where} can lose with "
        f"{', '.join(named_constraints(config, sites))}: the largest possible {part.cost.most(most, total)}. "
        f"Reduce the budget, or relax the constraint."
    )


def _fill(pool: list[Steps], target: Budget, cuts: dict[SiteKey, int], mode: str, makes_up: bool) -> int:
    """Cut the sites of `pool` until `target` is met to within one step, and return by how much it was exceeded."""
    taken = {step.site.key: 0 for step in pool}
    removed = _take(pool, target, taken, mode, makes_up)
    cuts |= {step.site.key: int(step.stops[taken[step.site.key]]) for step in pool}
    surplus = removed - target.amount
    return _give_back(pool, surplus, cuts) if target.at_least else surplus


def _take(pool: list[Steps], target: Budget, taken: dict[SiteKey, int], mode: str, makes_up: bool) -> int:
    """Take steps from `pool` with the target divided among the kinds by `mode`, and return how much was removed.

    With `makes_up`, the remainder that channels round down is left to the channels of the next pool, and not to the
    heads of this one.
    """
    kinds = {step.site.kind for step in pool}
    if mode == BudgetSharing.JOINT or len(kinds) == 1:
        return _spend(pool, target, taken)
    attention = [step for step in pool if step.site.kind == UnitKind.ATTENTION]
    mlp = [step for step in pool if step.site.kind == UnitKind.MLP]
    heads = round(target.amount * _prunable(attention) / _prunable(pool)) if target.heads is None else target.heads
    removed = _spend(attention, replace(target, amount=min(heads, target.amount), at_least=False), taken)
    removed += _spend(mlp, replace(target, amount=target.amount - removed), taken)
    channels_left = any(taken[step.site.key] < len(step.keys) for step in mlp)
    if removed < target.amount and not (makes_up and channels_left):
        # No channels are left, or less than a channel is missing. Another head is removed if that is closer.
        removed += _spend(attention, replace(target, amount=target.amount - removed), taken)
    return removed


def _give_back(pool: list[Steps], surplus: int, cuts: dict[SiteKey, int]) -> int:
    """Give units back to the sites of `pool` as long as the surplus allows, and return the remaining surplus.

    Units with the highest scores are returned first. A step may have skipped smaller cuts that would have met the
    target.
    """
    while True:
        refundable = []
        for step in pool:
            cut = cuts[step.site.key]
            smaller = int(torch.searchsorted(step.saved, step.saved[cut] - surplus))
            if smaller < cut:
                refundable.append((float(step.lost[cut] - step.lost[smaller]), smaller, step))
        if not refundable:
            return surplus
        _, smaller, step = max(refundable, key=lambda entry: entry[0])
        surplus -= int(step.saved[cuts[step.site.key]] - step.saved[smaller])
        cuts[step.site.key] = smaller


def _spend(pool: list[Steps], budget: Budget, taken: dict[SiteKey, int]) -> int:
    """Take the lowest-ranked steps of `pool` up to the budget, and return how much was removed.

    The step that crosses the budget is taken if the sum is then closer to the budget; it is always taken with
    `at_least`, and never with `at_most`.
    """
    target = budget.amount
    keys = torch.cat([step.keys[taken[step.site.key] :] for step in pool])
    costs = torch.cat([step.costs[taken[step.site.key] :] for step in pool])
    owners = torch.cat(
        [torch.full((len(step.keys) - taken[step.site.key],), index) for index, step in enumerate(pool)]
    )
    order = keys.argsort(stable=True)
    sums = costs[order].cumsum(0)
    prefix = int((sums <= target).sum())
    removed = int(sums[prefix - 1]) if prefix else 0
    for index, count in enumerate(owners[order[:prefix]].bincount(minlength=len(pool)).tolist()):
        taken[pool[index].site.key] += count

    def next_steps() -> list[tuple[float, int, Steps]]:
        return [
            (float(step.keys[done]), int(step.costs[done]), step)
            for step in pool
            if (done := taken[step.site.key]) < len(step.keys)
        ]

    # Smaller units may use the rest of the budget that a large unit exceeds.
    while fitting := [entry for entry in next_steps() if entry[1] <= target - removed]:
        _, cost, step = min(fitting, key=lambda entry: entry[0])
        taken[step.site.key] += 1
        removed += cost
    if removed < target and (remaining := next_steps()):
        _, cost, step = min(remaining, key=lambda entry: (entry[1], entry[0]))
        if budget.at_least or (not budget.at_most and 2 * (target - removed) > cost):
            taken[step.site.key] += 1
            removed += cost
    return removed
