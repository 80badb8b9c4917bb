"""Scores and a budget in, kept units out. Pure functions that know neither models nor methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .architectures import ATTENTION, MLP, Site, SiteKey
from .configuration import PruningConfig


@dataclass(frozen=True)
class Budget:
    """How many prunable parameters to remove.

    Args:
        parameters (`int`): the number.
        at_least (`bool`, defaults to `False`): round up, for a target that the model must fit into; otherwise to the
            nearest number that whole units allow.
    """

    parameters: int
    at_least: bool = False


class _Steps:
    """The order in which a site gives up its units: the smallest cuts that keep its constraints, cheapest first."""

    def __init__(self, site: Site, scores: torch.Tensor, config: PruningConfig, additive: bool):
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
        self.ends = (per_group - kept) * site.num_groups
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
        self.costs = sizes * site.unit_parameters

        taken = int(self.ends[-1]) if len(self.ends) else 0
        sums = torch.cat([scores.new_zeros(1, dtype=torch.float64), scores.double()[self.order[:taken]].cumsum(0)])
        lost = sums[self.ends].diff(prepend=sums[:1])
        self.keys = lost / (self.costs if additive else sizes)
        self.site = site

    def kept(self, steps: int) -> list[int]:
        removed = int(self.ends[steps - 1]) if steps else 0
        return self.order[removed:].sort().values.tolist()

    def removable(self) -> int:
        return int(self.costs.sum())


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


def prunable_sites(sites: Iterable[Site], config: PruningConfig) -> list[Site]:
    """Return the sites that the request may prune: of its kinds, outside of the layers that it skips.

    Raises:
        ValueError: where a skipped layer does not exist.
    """
    sites = list(sites)
    num_layers = 1 + max(site.layer for site in sites)
    for layer in config.skip_layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"skip_layers names layer {layer}; the model has layers 0 to {num_layers - 1}.")
    skipped = {layer % num_layers for layer in config.skip_layers}
    return [site for site in sites if site.kind in config.kinds and site.layer not in skipped]


def levels_of(site: Site, scores: torch.Tensor, config: PruningConfig) -> list[list[int]]:
    """Return the units that stay after each of the cuts that the request allows, the smallest cut first."""
    steps = _Steps(site, scores, config, additive=False)
    return [steps.kept(count) for count in range(1, len(steps.ends) + 1)]


def fewest_units(site: Site, config: PruningConfig) -> int:
    """Return how many units `site` keeps at least under the request."""
    steps = _Steps(site, torch.zeros(site.num_units), config, additive=False)
    return site.num_units - (int(steps.ends[-1]) if len(steps.ends) else 0)


def allocate(
    sites: list[Site],
    scores: Mapping[SiteKey, torch.Tensor],
    config: PruningConfig,
    budget: Budget,
    additive: bool = True,
) -> dict[SiteKey, list[int]]:
    """Choose the units that stay.

    Within a site the lowest scores go first. With `scope="layer"` every layer gives the same share of its parameters,
    with `"global"` all layers compete; with `budget="separate"` attention and MLP each give their share (MLP channels,
    being small, also take what whole heads leave over), with `"joint"` they compete. `attention_sparsity` and
    `mlp_sparsity` are two budgets of their own.

    Args:
        sites (`list[Site]`): every site of the model.
        scores (mapping of site key to `Tensor[num_units]`): higher is kept.
        config (`PruningConfig`): scope, budgets and constraints.
        budget (`Budget`): parameters to remove.
        additive (`bool`): rank units of different sites by score per parameter rather than by score.

    Returns:
        `dict`: site key to sorted kept unit indices, for every site.

    Raises:
        ValueError: where the constraints do not allow the budget, naming them and the largest sparsity they allow.
    """
    steps = {site.key: _Steps(site, scores[site.key], config, additive) for site in prunable_sites(sites, config)}
    prunable = sum(site.num_parameters for site in sites)

    if config.has_budget_per_kind:
        parts = []
        for kind in config.kinds:
            of_kind = sum(site.num_parameters for site in sites if site.kind == kind)
            parts.append(([key for key in steps if key[1] == kind], Budget(round(config.sparsity_of(kind) * of_kind))))
    else:
        parts = [(list(steps), budget)]

    taken = dict.fromkeys(steps, 0)
    for keys, part in parts:
        pools = _pools([steps[key] for key in keys], part, config.scope)
        _check_reachable(pools, part, prunable, config)
        for pool, target in pools:
            _fill(pool, target, taken, config.budget)
    return {
        site.key: steps[site.key].kept(taken[site.key]) if site.key in steps else list(range(site.num_units))
        for site in sites
    }


# Sites that compete, and what they give up together.
_Pool = tuple[list[_Steps], Budget]


def _pools(steps: list[_Steps], budget: Budget, scope: str) -> list[_Pool]:
    """Split the budget over groups of sites that compete: one per layer, or one for all."""
    by_layer: dict[int, list[_Steps]] = {}
    for step in steps:
        by_layer.setdefault(step.site.layer if scope == "layer" else 0, []).append(step)
    total = sum(_prunable(pool) for pool in by_layer.values())
    rounded = math.ceil if budget.at_least else round
    return [
        (pool, Budget(rounded(budget.parameters * _prunable(pool) / total), budget.at_least))
        for pool in by_layer.values()
    ]


def _prunable(pool: list[_Steps]) -> int:
    return sum(step.site.num_parameters for step in pool)


def _check_reachable(pools: list[_Pool], part: Budget, prunable: int, config: PruningConfig) -> None:
    """Raise `ValueError` where a pool cannot give its share of `part`, naming the largest share that all can give."""
    shares = []
    for pool, target in pools:
        removable = sum(step.removable() for step in pool)
        smallest = min((int(step.costs.min()) for step in pool if len(step.costs)), default=0)
        slack = 0 if target.at_least else smallest // 2
        if target.parameters > removable + slack:
            shares.append((removable / target.parameters, pool[0].site.layer))
    if not shares and (pools or part.parameters == 0):
        return
    # Every pool gives the same share, so the tightest one limits them all.
    share, layer = min(shares, default=(0.0, 0))
    possible = int(share * part.parameters / prunable * 1e4) / 1e4
    where = f"layer {layer}" if config.scope == "layer" and shares else "the model"
    constraints = [f"min_units_per_site={config.min_units_per_site}"]
    constraints += [f"multiple_of={config.multiple_of}"] * (config.multiple_of > 1)
    constraints += [f"skip_layers={config.skip_layers}"] * bool(config.skip_layers)
    constraints += [f"kinds={config.kinds}"] * (len(config.kinds) == 1)
    raise ValueError(
        f"Removing {part.parameters / prunable:.4g} of the prunable parameters is more than {where} can give under "
        f"{', '.join(constraints)}: the largest possible sparsity is {possible:g}. Ask for less, or relax the "
        f"constraint."
    )


def _fill(pool: list[_Steps], target: Budget, taken: dict[SiteKey, int], mode: str) -> None:
    """Take steps from `pool` until `target` is met to within one step."""
    kinds = {step.site.kind for step in pool}
    if mode == "joint" or len(kinds) == 1:
        _spend(pool, target.parameters, taken, target.at_least)
        return
    attention = [step for step in pool if step.site.kind == ATTENTION]
    mlp = [step for step in pool if step.site.kind == MLP]
    share = _prunable(attention) / _prunable(pool)
    removed = _spend(attention, min(round(target.parameters * share), target.parameters), taken)
    removed += _spend(mlp, target.parameters - removed, taken, target.at_least)
    if removed < target.parameters:
        # The channels ran out (or half a channel is missing); heads take the rest where one of them is closer.
        _spend(attention, target.parameters - removed, taken, target.at_least)


def _spend(pool: list[_Steps], target: int, taken: dict[SiteKey, int], at_least: bool = False) -> int:
    """Take the lowest-ranked steps of `pool` up to `target` parameters and return how many were removed.

    The last step is taken where that brings the sum closer to the target, or always with `at_least`.
    """
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
        if at_least or 2 * (target - removed) > cost:
            taken[step.site.key] += 1
            removed += cost
    return removed
