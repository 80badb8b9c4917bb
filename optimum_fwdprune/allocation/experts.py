"""The choice of experts: every layer keeps the same number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..architectures import Site, SiteKey
from ..architectures.experts import why_fewest
from ..request.config import PruningConfig
from .budgets import Budget, OutOfReach


def kept_experts(
    sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor], config: PruningConfig, budget: Budget
) -> dict[SiteKey, list[int]]:
    """Choose the experts that are kept: in every layer the same number, which is an entry of the config, and in every
    group of a layer too. The lowest scores are removed.

    Args:
        sites (sequence of `Site`): every site of the model.
        scores (mapping of site key to `Tensor[num_units]`): units with higher scores are kept.
        config (`PruningConfig`): the request, with its `min_units_per_site`.
        budget (`Budget`): how much to remove.

    Raises:
        OutOfReach: where fewer experts would be left than a token uses; the message names the numbers.
    """
    mixtures = [site for site in sites if site.routing is not None]
    kept = {site.key: list(range(site.num_units)) for site in sites}
    per_group = number_removed(mixtures, config, budget) // mixtures[0].num_groups
    for site in mixtures:
        ranked = scores[site.key].double().view(site.num_groups, -1).argsort(dim=1, stable=True)
        offsets = torch.arange(site.num_groups)[:, None] * (site.num_units // site.num_groups)
        kept[site.key] = (ranked + offsets)[:, per_group:].flatten().sort().values.tolist()
    return kept


def number_removed(mixtures: Sequence[Site], config: PruningConfig, budget: Budget) -> int:
    """Return how many experts of every layer a budget removes.

    Args:
        mixtures (sequence of `Site`): the sites with experts, which all have the same number.
        config (`PruningConfig`): the request.
        budget (`Budget`): how much to remove.

    Raises:
        OutOfReach: where fewer experts would be left than a token uses.
    """
    site, cost = mixtures[0], budget.cost
    experts, groups = site.num_units, site.num_groups
    # What a step saves, which removes an expert of every group of every layer.
    step = sum(cost.total(other) for other in mixtures) // experts * groups
    steps = -(-budget.amount // step) if budget.at_least else round(budget.amount / step)
    fewest = -(-max(site.fewest_units, config.min_units_per_site) // groups) * groups
    if steps * groups > experts - fewest:
        most = (experts - fewest) // groups
        total = sum(cost.total(other) for other in mixtures)
        reason = f"min_units_per_site={config.min_units_per_site}" if fewest > site.fewest_units else why_fewest(site)
        raise OutOfReach(
            f"{cost.asked(budget.amount, total)} leaves {max(0, experts - steps * groups)} of {experts} experts in "
            f"every layer, and {reason}. The largest possible {cost.most(most * step, total)}."
        )
    return steps * groups
