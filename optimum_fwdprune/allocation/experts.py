"""The choice of experts: every layer keeps the same number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..architectures import Site, SiteKey
from ..architectures.experts import why_fewest
from ..request.config import PruningConfig
from .budgets import Budget, OutOfReach


def kept_experts(
    sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor], config: PruningConfig, budget: Budget
) -> tuple[dict[SiteKey, list[int]], Budget]:
    """Choose the experts that are kept: in every layer the same number, which is an entry of the config, and in every
    group of a layer too. The lowest scores are removed.

    Args:
        sites (sequence of `Site`): every site of the model that is left.
        scores (mapping of site key to `Tensor[num_units]`): units with higher scores are kept.
        config (`PruningConfig`): the request, with its `min_units_per_site`.
        budget (`Budget`): how much to remove.

    Returns:
        `tuple`: the kept experts of the mixtures, and the budget of the heads and channels.

    Raises:
        OutOfReach: where fewer experts would be left than a token uses; the message names the numbers.
    """
    mixtures = [site for site in sites if site.routing is not None]
    others = [site for site in sites if site.kind in config.width_kinds and not site.fixed]
    if not mixtures:
        # All layers with experts are removed.
        return {}, budget
    removed, rest = _number_removed(mixtures, others, config, budget)
    per_group, kept = removed // mixtures[0].num_groups, {}
    for site in mixtures:
        ranked = scores[site.key].double().view(site.num_groups, -1).argsort(dim=1, stable=True)
        offsets = torch.arange(site.num_groups)[:, None] * (site.num_units // site.num_groups)
        kept[site.key] = (ranked + offsets)[:, per_group:].flatten().sort().values.tolist()
    return kept, rest


def _number_removed(
    mixtures: Sequence[Site], others: Sequence[Site], config: PruningConfig, budget: Budget
) -> tuple[int, Budget]:
    """Return how many experts of every layer a budget removes, and what is left of it for heads and channels.

    All units lose the same share of their cost. A target is rounded up to whole experts, and heads and channels remove
    what is missing then. With `expert_sparsity`, experts lose this share.

    Args:
        mixtures (sequence of `Site`): the sites with experts, which all have the same number.
        others (sequence of `Site`): the sites that lose heads or channels; empty where there are none.
        config (`PruningConfig`): the request.
        budget (`Budget`): how much to remove.

    Raises:
        OutOfReach: where fewer experts would be left than a token uses, or the removed experts are less than a target
            requires.
    """
    site, cost = mixtures[0], budget.cost
    experts, groups = site.num_units, site.num_groups
    of_experts = sum(cost.total(other) for other in mixtures)
    total = of_experts + sum(cost.total(other) for other in others)
    # What a step saves, which removes an expert of every group of every layer, and the most steps.
    step = of_experts // experts * groups
    fewest = -(-max(site.fewest_units, config.min_units_per_site) // groups) * groups
    most = (experts - fewest) // groups
    if config.expert_sparsity is not None:
        steps = round(config.expert_sparsity * experts / groups)
    elif budget.at_least:
        steps = -(-budget.amount * experts // (total * groups))
    else:
        steps = round(budget.amount * experts / (total * groups))
    others_can_give = budget.at_least and bool(others) and config.expert_sparsity is None
    if budget.as_far_as_possible or others_can_give:
        steps = min(steps, most)
    if steps > most:
        reason = f"min_units_per_site={config.min_units_per_site}" if fewest > site.fewest_units else why_fewest(site)
        asked, largest = cost.asked(budget.amount, total), cost.most(most * step, total)
        if config.expert_sparsity is not None:
            asked = f"expert_sparsity={config.expert_sparsity:g}"
            largest = f"expert_sparsity is {int(most * groups / experts * 1e4) / 1e4:g}"
        raise OutOfReach(
            f"{asked} leaves {max(0, experts - steps * groups)} of {experts} experts in every layer, and {reason}. "
            f"The largest possible {largest}."
        )
    saved = steps * step
    if not others and budget.at_least and saved < budget.amount and not budget.as_far_as_possible:
        raise OutOfReach(
            f"{cost.asked(budget.spent + budget.amount, budget.spent + total)} needs more than the "
            f"{steps * groups} of {experts} experts that expert_sparsity={config.expert_sparsity:g} removes. The "
            f"largest possible {cost.most(budget.spent + saved, budget.spent + total)}."
        )
    left = budget.amount - saved if budget.at_least else round(budget.amount * (total - of_experts) / total)
    rest = replace(budget, amount=max(0, left), spent=budget.spent + saved, beside=of_experts - saved)
    return steps * groups, rest
