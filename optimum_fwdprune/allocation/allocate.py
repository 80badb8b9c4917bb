"""Scores and a budget in, kept units out. Pure functions that know neither models nor methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from ..architectures import (
    ATTENTION,
    MLP,
    Site,
    SiteKey,
)
from ..request.config import PruningConfig
from .budgets import (
    PARAMETERS,
    Budget,
    Cost,
    ParameterCost,
)


# The layers that a deep model can least do without (docs/quality.md).
ENDS = [0, 1, -2, -1]
FEWEST_WITH_ENDS = 12

# Steps in which a coarse grid takes the widest cut of an MLP.
LEVELS = 16


class OutOfReach(ValueError):
    """The constraints of a request do not allow its budget."""


class _Steps:
    """The order in which a site gives up its units: the smallest cuts that keep its constraints, cheapest first."""

    def __init__(
        self, site: Site, scores: torch.Tensor, config: PruningConfig, additive: bool, cost: Cost = PARAMETERS
    ):
        per_group = site.num_units // site.num_groups
        grouped = scores.double().view(site.num_groups, per_group)
        ranked = grouped.argsort(dim=1, stable=True)
        offsets = torch.arange(site.num_groups)[:, None] * per_group
        # One unit of every group at a time: [step, group], flattened.
        self.order = (ranked + offsets).T.flatten()

        multiple = config.multiple_of if site.kind == MLP else 1
        floor = -(-config.min_units_per_site // site.num_groups)
        # Kept units per group after each step: the largest multiple below the present width, and down to the floor.
        largest = (per_group - 1) // multiple * multiple
        kept = torch.tensor(range(largest, floor - 1, -multiple), dtype=torch.int64)
        ends = (per_group - kept) * site.num_groups
        # What went, and what that saved, before the first step and after each.
        gone = torch.cat([ends.new_zeros(1), ends])
        sums = torch.cat([scores.new_zeros(1, dtype=torch.float64), scores.double()[self.order].cumsum(0)])
        costs = cost.of(site, site.num_units - gone)
        saved = costs[0] - costs
        # Units of a site all have the same parameters, and the lowest scores go first: convex as it is.
        pooled = additive and not isinstance(cost, ParameterCost)
        places = _convex(sums[gone], saved) if pooled else torch.arange(1, len(gone))
        self.costs = saved[places].diff(prepend=saved[:1])
        sizes = gone[places].diff(prepend=gone[:1])
        self.keys = sums[gone[places]].diff(prepend=sums[:1]) / (self.costs if additive else sizes)
        self.total = int(costs[0])
        self.site = site
        # All the cuts there are, of which steps may take several at once.
        self.gone, self.saved, self.lost = gone, saved, sums[gone]
        self.stops = torch.cat([places.new_zeros(1), places])

    def kept(self, cut: int) -> list[int]:
        return self.order[int(self.gone[cut]) :].sort().values.tolist()

    def removable(self) -> int:
        return int(self.saved[-1])


def _convex(lost: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """Return after which steps to stop so that the loss per saving never falls from one stop to the next.

    A step that opens up a cheaper one becomes one with it.

    Args:
        lost, saved (`Tensor[steps + 1]`): in all, before the first step and after each.
    """
    hull = [0]
    for place in range(1, len(lost)):
        while len(hull) > 1 and _slope(lost, saved, hull[-1], place) < _slope(lost, saved, hull[-2], hull[-1]):
            hull.pop()
        hull.append(place)
    return torch.tensor(hull[1:], dtype=torch.int64)


def _slope(lost: torch.Tensor, saved: torch.Tensor, start: int, end: int) -> float:
    return float((lost[end] - lost[start]) / (saved[end] - saved[start]))


def prunable_sites(sites: Iterable[Site], config: PruningConfig) -> list[Site]:
    """Return the sites that the request may prune: of its kinds, outside of the layers that it skips.

    Raises:
        ValueError: where a skipped layer does not exist.
    """
    sites = list(sites)
    num_layers = 1 + max(site.layer for site in sites)
    skip_layers = _layers_to_skip(config, num_layers)
    for layer in skip_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"skip_layers names layer {layer}; the model has layers 0 to {num_layers - 1}.")
    skipped = {layer % num_layers for layer in skip_layers}
    return [site for site in sites if site.kind in config.resolved_kinds and site.layer not in skipped]


def _layers_to_skip(config: PruningConfig, num_layers: int) -> list[int]:
    if config.skip_layers is None:
        return ENDS if spares_ends(config, num_layers) else []
    return config.skip_layers


def spares_ends(config: PruningConfig, num_layers: int) -> bool:
    """Whether the first and last layers of a model stay unpruned by default."""
    by_default = config.skip_layers is None and config.resolved_scope == "layer" and config.layout == "any"
    return by_default and num_layers >= FEWEST_WITH_ENDS


def levels_of(site: Site, scores: torch.Tensor, config: PruningConfig) -> list[list[int]]:
    """Return the units that stay after each of the cuts that the request allows, the smallest cut first."""
    steps = _Steps(site, scores, config, additive=False)
    return [steps.kept(cut) for cut in range(1, len(steps.gone))]


def fewest_units(site: Site, config: PruningConfig) -> int:
    """Return how many units `site` keeps at least under the request."""
    steps = _Steps(site, torch.zeros(site.num_units, dtype=torch.float32), config, additive=False)
    return site.num_units - int(steps.gone[-1])


def coarse_multiple(sites: Sequence[Site], config: PruningConfig) -> int:
    """Return a multiple of `multiple_of` that gives the widest MLP about `LEVELS` widths."""
    widest = max((site.num_units for site in sites if site.kind == MLP), default=1)
    return -(-widest // (LEVELS * config.multiple_of)) * config.multiple_of


def allocate(
    sites: list[Site],
    scores: Mapping[SiteKey, torch.Tensor],
    config: PruningConfig,
    budget: Budget,
    additive: bool = True,
) -> dict[SiteKey, list[int]]:
    """Choose the units that stay.

    Within a site the lowest scores go first. With `scope="layer"` every layer gives the same share of its parameters,
    to within a step of `multiple_of` where that brings all layers together nearer to the budget; with `"global"` all
    layers compete. With `budget="separate"` attention and MLP each give their share (MLP channels, being small, also
    take what whole heads leave over), with `"joint"` they compete. `attention_sparsity` and `mlp_sparsity` are two
    budgets of their own.

    Args:
        sites (`list[Site]`): every site of the model.
        scores (mapping of site key to `Tensor[num_units]`): higher is kept.
        config (`PruningConfig`): scope, budgets and constraints.
        budget (`Budget`): what to remove, in parameters or another cost.
        additive (`bool`): rank units of different sites by score per cost rather than by score.

    Returns:
        `dict`: site key to sorted kept unit indices, for every site.

    Raises:
        OutOfReach: where the constraints do not allow the budget, naming them and the largest sparsity they allow.
    """
    cost, open_sites = budget.cost, prunable_sites(sites, config)
    if config.layout == "stock":
        scores = _alike(open_sites, scores)
    steps = {site.key: _Steps(site, scores[site.key], config, additive, cost) for site in open_sites}
    if config.has_budget_per_kind:
        parts = []
        for kind in config.resolved_kinds:
            of_kind = sum(site.num_parameters for site in sites if site.kind == kind)
            part = Budget(
                round(config.sparsity_of(kind) * of_kind),
                cost=ParameterCost(kind, config.field_of(kind)),
                as_far_as_possible=budget.as_far_as_possible,
            )
            parts.append(([key for key in steps if key[1] == kind], part, of_kind))
    else:
        parts = [(list(steps), budget, sum(cost.total(site) for site in sites))]

    cuts = dict.fromkeys(steps, 0)
    for keys, part, total in parts:
        pools = _pools([steps[key] for key in keys], part, config.resolved_scope)
        _check_reachable(pools, part, total, config, 1 + max(site.layer for site in sites))
        makes_up = _makes_up(part, config, keys)
        surplus = 0
        for pool, target in pools:
            left = _fill(pool, replace(target, amount=target.amount - surplus), cuts, config.budget, makes_up)
            surplus = left if makes_up else 0
    return {
        site.key: steps[site.key].kept(cuts[site.key]) if site.key in steps else list(range(site.num_units))
        for site in sites
    }


def _makes_up(part: Budget, config: PruningConfig, keys: Sequence[SiteKey]) -> bool:
    """Whether pools make up for what the rounding of those before them removed too much or too little.

    Rounded up in every layer, a target would be overshot as often as there are layers; and where MLP widths are
    multiples, layers of one shape would all round the same way.
    """
    if config.layout == "stock":
        return False
    coarse = config.multiple_of > 1 and any(kind == MLP for _, kind in keys)
    return part.at_least or (coarse and not part.at_most)


def _alike(sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor]) -> dict[SiteKey, torch.Tensor]:
    """Return scores under which layers are cut alike: the units of a site, from the lowest to the highest, score what
    those of their rank in all layers score on average."""
    found: dict[SiteKey, torch.Tensor] = {}
    for _, group in groupby(sorted(sites, key=_shape), key=_shape):
        of_shape = list(group)
        grouped = torch.stack([scores[site.key].double().view(site.num_groups, -1) for site in of_shape])
        ascending, ranked = grouped.sort(dim=2, stable=True)
        same = torch.zeros_like(grouped).scatter_(2, ranked, ascending.mean(dim=0).expand_as(grouped))
        found |= {site.key: values.flatten() for site, values in zip(of_shape, same)}
    return found


def _shape(site: Site) -> tuple[str, int, int]:
    return site.kind, site.num_units, site.num_groups


# Sites that compete, and what they give up together.
_Pool = tuple[list[_Steps], Budget]


def pool_of(site: Site, scope: str) -> int:
    """Return the key of the pool that the site competes in: one per layer, or one for all."""
    return site.layer if scope == "layer" else 0


def _pools(steps: list[_Steps], budget: Budget, scope: str) -> list[_Pool]:
    """Split the budget over the pools."""
    pools: dict[int, list[_Steps]] = {}
    for step in steps:
        pools.setdefault(pool_of(step.site, scope), []).append(step)
    if budget.by_pool is not None:
        parts = ((pool, *budget.by_pool[key]) for key, pool in pools.items())
        return [(pool, replace(budget, amount=amount, heads=heads)) for pool, amount, heads in parts]
    amounts = budget.divided({key: _prunable(pool) for key, pool in pools.items()})
    return [(pool, replace(budget, amount=amounts[key])) for key, pool in pools.items()]


def _prunable(pool: list[_Steps]) -> int:
    return sum(step.total for step in pool)


def _check_reachable(pools: list[_Pool], part: Budget, total: int, config: PruningConfig, num_layers: int) -> None:
    """Raise `ValueError` where a pool cannot give its share of `part`, naming the largest share that all can give."""
    shares = []
    for pool, target in pools:
        removable = sum(step.removable() for step in pool)
        smallest = min((int(step.costs.min()) for step in pool if len(step.costs)), default=0)
        slack = 0 if target.at_least else smallest // 2
        if target.amount > removable + slack:
            shares.append((removable / target.amount, pool[0].site.layer))
    if part.as_far_as_possible or (not shares and (pools or part.amount == 0)):
        return
    # Every pool gives the same share, so the tightest one limits them all.
    share, layer = min(shares, default=(0.0, 0))
    where = f"layer {layer}" if config.resolved_scope == "layer" and shares else "the model"
    raise OutOfReach(
        f"{part.cost.asked(part.amount, total)} is more than {where} can give under "
        f"{', '.join(_constraints(config, num_layers))}: the largest possible "
        f"{part.cost.most(share * part.amount, total)}. Ask for less, or relax the constraint."
    )


def _constraints(config: PruningConfig, num_layers: int) -> list[str]:
    """Name the options that limit what can be removed: those that are set, and defaults that can be relaxed."""
    constraints = []
    if config.multiple_of > 1:
        # Under a speed-up these are the widths that were timed, whatever the request says.
        timed = f"MLP widths in multiples of {config.multiple_of}, which are those that were timed"
        constraints.append(timed if config.target_speedup is not None else f"multiple_of={config.multiple_of}")
    if skip_layers := _layers_to_skip(config, num_layers):
        default = " (the default here, [] spares none)" if config.skip_layers is None else ""
        constraints.append(f"skip_layers={skip_layers}{default}")
    if config.layout == "stock" and config.kinds is None and len(config.resolved_kinds) == 1:
        constraints.append("layout='stock', which leaves the attention heads whole here")
    if config.kinds is not None and len(config.kinds) == 1:
        constraints.append(f"kinds={config.kinds}")
    # One unit always stays, which is what there is to name where nothing else is.
    if config.min_units_per_site > 1 or not constraints:
        constraints.insert(0, f"min_units_per_site={config.min_units_per_site}")
    return constraints


def _fill(pool: list[_Steps], target: Budget, cuts: dict[SiteKey, int], mode: str, makes_up: bool) -> int:
    """Cut the sites of `pool` until `target` is met to within one step, and return how much more went than that."""
    taken = {step.site.key: 0 for step in pool}
    removed = _take(pool, target, taken, mode, makes_up)
    cuts |= {step.site.key: int(step.stops[taken[step.site.key]]) for step in pool}
    surplus = removed - target.amount
    return _give_back(pool, surplus, cuts) if target.at_least else surplus


def _take(pool: list[_Steps], target: Budget, taken: dict[SiteKey, int], mode: str, makes_up: bool) -> int:
    """Take steps from `pool` as `mode` divides the target over the kinds, and return how much was removed.

    With `makes_up`, what channels round down is left to those of the next pool, and not to the heads of this one.
    """
    kinds = {step.site.kind for step in pool}
    if mode == "joint" or len(kinds) == 1:
        return _spend(pool, target, taken)
    attention = [step for step in pool if step.site.kind == ATTENTION]
    mlp = [step for step in pool if step.site.kind == MLP]
    heads = round(target.amount * _prunable(attention) / _prunable(pool)) if target.heads is None else target.heads
    removed = _spend(attention, replace(target, amount=min(heads, target.amount), at_least=False), taken)
    removed += _spend(mlp, replace(target, amount=target.amount - removed), taken)
    channels_left = any(taken[step.site.key] < len(step.keys) for step in mlp)
    if removed < target.amount and not (makes_up and channels_left):
        # The channels ran out (or half a channel is missing); heads take the rest where one of them is closer.
        removed += _spend(attention, replace(target, amount=target.amount - removed), taken)
    return removed


def _give_back(pool: list[_Steps], surplus: int, cuts: dict[SiteKey, int]) -> int:
    """Return units to the sites of `pool` while the surplus pays for them, and return what remains of it.

    The dearest are the first: a step may have gone past smaller cuts that would have done for the target.
    """
    while True:
        found = []
        for step in pool:
            cut = cuts[step.site.key]
            smaller = int(torch.searchsorted(step.saved, step.saved[cut] - surplus))
            if smaller < cut:
                found.append((float(step.lost[cut] - step.lost[smaller]), smaller, step))
        if not found:
            return surplus
        _, smaller, step = max(found, key=lambda entry: entry[0])
        surplus -= int(step.saved[cuts[step.site.key]] - step.saved[smaller])
        cuts[step.site.key] = smaller


def _spend(pool: list[_Steps], budget: Budget, taken: dict[SiteKey, int]) -> int:
    """Take the lowest-ranked steps of `pool` up to the budget and return how much was removed.

    The last step is taken where that brings the sum closer to the budget; always with `at_least`, never with
    `at_most`.
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

    def next_steps() -> list[tuple[float, int, _Steps]]:
        return [
            (float(step.keys[done]), int(step.costs[done]), step)
            for step in pool
            if (done := taken[step.site.key]) < len(step.keys)
        ]

    # A large unit that no longer fits must not keep small ones from using up what is left.
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
