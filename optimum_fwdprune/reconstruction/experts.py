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
            Their residuals are changed to what the new projections leave.
        ridge (`float`, *optional*): the ridge of all experts; by default the best one on held-out tokens.
    """
    assert site.routing is not None
    counts = torch.zeros(site.num_units, dtype=torch.int64)
    for batch in (batch for text in texts for batch in text):
        counts += batch.indices.flatten().bincount(minlength=site.num_units).cpu()
    counts = ranks.summed(counts)
    order = sorted((expert for expert in kept if counts[expert]), key=lambda expert: -float(counts[expert]))
    ridges = dict.fromkeys(order, DEFAULT_RIDGE if ridge is None else ridge)
    before = after = None
    if len(texts) > 1:
        before = _mean_square(texts[1])
        ridges, after = _helpful_ridges(site, order, texts, ridge)
    weights = {expert: site.routing.output_weight(expert) for expert in kept}
    everything = [batch for text in texts for batch in text]
    for expert in (expert for expert in order if expert in ridges):
        rows = [_routed(site, expert, batch) for batch in everything]
        change = _equations(site, expert, rows).change(ridges[expert])
        _apply(change, rows)
        weights[expert] = back_to(precise(weights[expert]) + change, weights[expert])
    # Without a change, the model's own parameter is cut.
    stacked = torch.stack([site.routing.as_stored(weights[expert]) for expert in kept]) if ridges else None
    routed = [int(counts[expert]) for expert in kept]
    result = ExpertRefit(routed, len(ridges), median(ridges.values()) if ridges else 0.0, before, after)
    return Projection(kept, site.weight.new_empty(0) if stacked is None else stacked, None), result


def _helpful_ridges(
    site: Site, order: list[int], texts: Sequence[Sequence[RoutedTokens]], ridge: float | None
) -> tuple[dict[int, float], float]:
    """Return the ridges of the experts whose change lowers the error on held-out tokens if it is fitted on the others,
    and the error with all these changes. The residuals are not changed."""
    fit, held_out = ([replace(batch, residual=batch.residual.clone()) for batch in text] for text in texts)
    ridges = {}
    for expert in order:
        rows = [[_routed(site, expert, batch) for batch in text] for text in (fit, held_out)]
        sums, left = (_equations(site, expert, of_text) for of_text in rows)
        if not left.count or not sums.count:
            continue
        best = best_ridge(sums, left) if ridge is None else ridge
        change = sums.change(best)
        if left.error(change) < float(left.energy):
            ridges[expert] = best
            _apply(change, [row for of_text in rows for row in of_text])
    return ridges, _mean_square(held_out)


@dataclass(frozen=True)
class _Rows:
    """The tokens of an expert in a batch.

    Args:
        batch (`RoutedTokens`): the batch.
        token (`Tensor[rows]`, int64): their numbers in the batch.
        features (`Tensor[rows, features]`, float32): g(x) h(x), the inputs of its projection times the router weight.
    """

    batch: RoutedTokens
    token: torch.Tensor
    features: torch.Tensor


def _routed(site: Site, expert: int, batch: RoutedTokens) -> _Rows:
    assert site.routing is not None
    device = compute_device(site.routing.experts)
    token, slot = torch.where(batch.indices == expert)
    features = site.routing.features(expert, batch.hidden[token].to(device))
    return _Rows(batch, token, features.float() * batch.weights[token, slot, None].to(device).float())


def _equations(site: Site, expert: int, rows: Sequence[_Rows]) -> NormalEquations:
    assert site.routing is not None
    outputs, width = site.routing.output_weight(expert).shape
    sums = NormalEquations.empty(width, outputs, compute_device(site.routing.experts))
    for of_batch in rows:
        sums.add(of_batch.features, of_batch.batch.residual[of_batch.token].to(of_batch.features.device))
    return sums.pooled()


def _apply(change: torch.Tensor, rows: Sequence[_Rows]) -> None:
    """Subtract the effect of a change of an expert's projection from the residuals of its tokens."""
    for of_batch in rows:
        effect = of_batch.features @ change.to(of_batch.features).T
        of_batch.batch.residual[of_batch.token] -= effect.to(of_batch.batch.residual.device)


def _mean_square(text: Sequence[RoutedTokens]) -> float:
    energy = torch.zeros((), dtype=torch.float64)
    for batch in text:
        energy += precise_sum(batch.residual.square()).cpu()
    count = torch.tensor(float(sum(len(batch.residual) for batch in text)), dtype=torch.float64)
    energy, count = ranks.summed(torch.stack([energy, count]))
    return float(energy / count)
