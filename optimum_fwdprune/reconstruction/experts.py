"""Refitting the output projections of kept experts, one expert after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from ..architectures import Site
from ..forward.gates import Projection
from ..runs import ranks
from ..runs.devices import back_to, compute_device, precise, precise_sum
from .least_squares import DEFAULT_RIDGE, NormalEquations, best_ridge


@dataclass
class RoutedTokens:
    """Tokens of a batch before a mixture of the pruned model, without padding.

    Args:
        hidden (`Tensor[tokens, hidden]`): inputs of the experts.
        indices (`Tensor[tokens, chosen]`, int64): the experts that they are routed to.
        weights (`Tensor[tokens, chosen]`): the router's weights of these.
        residual (`Tensor[tokens, hidden]`, float32): the target of the mixture minus its output.
    """

    hidden: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor


@dataclass(frozen=True)
class ExpertRefit:
    """How the output projections of a mixture were determined.

    Args:
        routed (`list[int]`): number of tokens that the router of the pruned model sends to every kept expert.
        refitted (`int`): number of experts whose projection changed.
        ridge (`float`): median of their ridges.
        error_before, error_after (`float`, *optional*): mean squared norm of the residual of held-out tokens, without
            a change and with changes that were fitted on the other tokens; `None` if there are no held-out tokens.
    """

    routed: list[int]
    refitted: int
    ridge: float
    error_before: float | None
    error_after: float | None

    def summary(self) -> dict[str, float | bool | list[int] | None]:
        """Return how the projections were determined, as JSON values."""
        return {
            "routed": self.routed,
            "refitted": self.refitted > 0,
            "experts_refitted": self.refitted,
            "ridge": self.ridge,
            "held_out_error_before": self.error_before,
            "held_out_error_after": self.error_after,
        }


def refit_experts(
    site: Site, kept: list[int], texts: Sequence[Sequence[RoutedTokens]], ridge: float | None
) -> tuple[Projection, ExpertRefit]:
    """Return the kept experts of a mixture with output projections that come closer to the target, and how they were
    determined.

    The output of the mixture is Σ g(x) W_e h_e(x) over the experts e of a token x. One expert after the other, from
    the one with the most tokens, W_e is fitted by least squares to the residual of its tokens that the experts before
    it have left. The ridge of every expert is chosen on held-out tokens, and its projection is not changed if the
    error on these does not fall. All tokens then determine the projections with these ridges.

    Args:
        site (`Site`): the site, whose parameters are in memory.
        kept (`list[int]`): the kept experts.
        texts (sequence of sequences of `RoutedTokens`): batches to fit on and, if there are any, the held-out batches.
        ridge (`float`, *optional*): the ridge of all experts; by default the best one on held-out tokens.
    """
    assert site.routing is not None
    counts = torch.zeros(site.num_units, dtype=torch.int64)
    for batch in (batch for text in texts for batch in text):
        counts += batch.indices.flatten().bincount(minlength=site.num_units).cpu()
    counts = ranks.summed(counts)
    order = sorted((expert for expert in kept if counts[expert]), key=lambda expert: -float(counts[expert]))
    fit, held_out = texts[0], texts[1] if len(texts) > 1 else None
    ridges = dict.fromkeys(order, DEFAULT_RIDGE if ridge is None else ridge)
    before = after = None
    if held_out is not None:
        trial = [_copied(text) for text in (fit, held_out)]
        before = _mean_square(held_out)
        ridges = {}
        for expert in order:
            sums, left = (_equations(site, expert, text) for text in trial)
            if not left.count or not sums.count:
                continue
            best = best_ridge(sums, left) if ridge is None else ridge
            change = sums.change(best)
            if left.error(change) < float(left.energy):
                ridges[expert] = best
                _apply(site, expert, change, [batch for text in trial for batch in text])
        after = _mean_square(trial[1])
    weights = {expert: site.routing.output_weight(expert) for expert in kept}
    everything = [batch for text in texts for batch in _copied(text)]
    for expert in (expert for expert in order if expert in ridges):
        change = _equations(site, expert, everything).change(ridges[expert])
        _apply(site, expert, change, everything)
        weights[expert] = back_to(precise(weights[expert]) + change, weights[expert])
    # Without a change, the model's own parameter is cut.
    stacked = torch.stack([site.routing.as_stored(weights[expert]) for expert in kept]) if ridges else None
    routed = [int(counts[expert]) for expert in kept]
    result = ExpertRefit(routed, len(ridges), median(ridges.values()) if ridges else 0.0, before, after)
    return Projection(kept, site.weight.new_empty(0) if stacked is None else stacked, None), result


def _copied(text: Sequence[RoutedTokens]) -> list[RoutedTokens]:
    """Return the batches with copies of their residuals, which change."""
    return [replace(batch, residual=batch.residual.clone()) for batch in text]


def _routed(site: Site, expert: int, batch: RoutedTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the tokens of an expert, and g(x) h(x) of these, `[tokens, features]` float32."""
    assert site.routing is not None
    device = compute_device(site.routing.experts)
    token, slot = torch.where(batch.indices == expert)
    features = site.routing.features(expert, batch.hidden[token].to(device))
    return token, features.float() * batch.weights[token, slot, None].to(device).float()


def _equations(site: Site, expert: int, text: Sequence[RoutedTokens]) -> NormalEquations:
    assert site.routing is not None
    outputs, width = site.routing.output_weight(expert).shape
    sums = NormalEquations.empty(width, outputs, compute_device(site.routing.experts))
    for batch in text:
        token, features = _routed(site, expert, batch)
        sums.add(features, batch.residual[token].to(features.device))
    return sums.pooled()


def _apply(site: Site, expert: int, change: torch.Tensor, text: Sequence[RoutedTokens]) -> None:
    """Subtract the effect of a change of an expert's projection from the residuals of its tokens."""
    for batch in text:
        token, features = _routed(site, expert, batch)
        batch.residual[token] -= (features @ change.to(features).T).to(batch.residual.device)


def _mean_square(text: Sequence[RoutedTokens]) -> float:
    energy = torch.zeros((), dtype=torch.float64)
    for batch in text:
        energy += precise_sum(batch.residual.square()).cpu()
    count = torch.tensor(float(sum(len(batch.residual) for batch in text)), dtype=torch.float64)
    energy, count = ranks.summed(torch.stack([energy, count]))
    return float(energy / count)
