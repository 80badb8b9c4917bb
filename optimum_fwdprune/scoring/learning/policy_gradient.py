"""Gradient of an expected loss from forward passes, and the projection onto a budget (arXiv 2406.10576)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..choices import Estimator


# Smallest keep probability during learning, since a unit with probability 0 would never be drawn again.
FLOOR = 1e-3


@dataclass(frozen=True)
class RateBudget:
    """Variables that share one budget: keep probabilities of units, or keep ratios of sites.

    Args:
        members (`Tensor[n]`, int64): their indices in the vector of all variables.
        weights (`Tensor[n]`, float64): cost of a rate of 1, which is positive: 1 to count units, or parameters.
        limit (`float`): largest Σ weight · rate.
        floors (`Tensor[n]`, float64): smallest rates.
        exact (`bool`, defaults to `False`): whether Σ weight · rate must equal the limit.
    """

    members: torch.Tensor
    weights: torch.Tensor
    limit: float
    floors: torch.Tensor
    exact: bool = False


def project(rates: torch.Tensor, budget: RateBudget) -> torch.Tensor:
    """Return the nearest point of {floor ≤ s ≤ 1, Σ w s ≤ limit}: `clamp(s - v w, floor, 1)` with the smallest v ≥ 0.

    An exact budget requires Σ w s = limit, with v of either sign. The solution is exact, too: Σ w clamp(s - v w) is
    piecewise linear in v, so that bisection over its corners determines the linear piece that meets the limit. The
    paper bisects v itself, with w = 1.

    Args:
        rates (`Tensor[n]`, float64): s of the budget's members, with any values.
        budget (`RateBudget`): w, floors and limit.

    Raises:
        ValueError: where the floors alone exceed the limit.
    """
    weights, floors, limit = budget.weights, budget.floors, budget.limit
    lowest, highest = float(weights @ floors), float(weights.sum())
    if limit < lowest * (1 - 1e-12):
        raise ValueError(
            f"The smallest keep rates cost {lowest:g}, which exceeds the budget of {limit:g}. Choose a lower "
            f"sparsity, or a smaller min_units_per_site."
        )
    if budget.exact and limit >= highest:
        return torch.ones_like(rates)

    def clamped(shift: torch.Tensor | float) -> torch.Tensor:
        return (rates - shift * weights).clamp(floors, torch.ones_like(floors))

    if not budget.exact and float(weights @ clamped(0.0)) <= limit:
        return clamped(0.0)
    corners = torch.cat([(rates - 1) / weights, (rates - floors) / weights])
    if not budget.exact:
        corners = torch.cat([corners.new_zeros(1), corners[corners > 0]])
    corners = corners.sort().values
    low, high = 0, len(corners) - 1
    # At the last corner all rates are at their floors, which meet the limit; at the first corner of an exact budget,
    # all of them are 1.
    while high - low > 1:
        middle = (low + high) // 2
        if float(weights @ clamped(corners[middle])) > limit:
            low = middle
        else:
            high = middle
    above, below = float(weights @ clamped(corners[low])), float(weights @ clamped(corners[high]))
    share = (above - limit) / (above - below) if above > below else 0.0
    return clamped(corners[low] + share * (corners[high] - corners[low]))


def policy_gradient(
    deviations: torch.Tensor,
    losses: torch.Tensor,
    estimator: str,
    baseline: float = 0.0,
    antithetic: bool = False,
) -> torch.Tensor:
    """Return the preconditioned gradient of the expected loss, estimated from a few draws: `[p]`, float64.

    A draw's score is its deviation from the mean divided by the standard deviation. So this is the gradient with
    respect to the means, times the standard deviations: `sqrt(s (1 - s)) ∇ E[L]` for masks with probabilities s.

    With `"leave_one_out"`, the baseline of a draw is the mean loss of the other draws, or of the other pairs if draws
    are antithetic, since the loss of the partner is not independent. This estimator is unbiased. `"moving_average"` is
    the paper's estimator, divided by N - 1. Its baseline includes this step's losses, and varies with the difficulty
    of the batches.

    Args:
        deviations (`Tensor[N, p]`, float64): deviations of the draws from the mean, in standard deviations.
        losses (`Tensor[N]`, float64): losses of the model with the draws, on the same tokens.
        estimator (`str`): `"leave_one_out"` or `"moving_average"`.
        baseline (`float`): baseline of `"moving_average"`.
        antithetic (`bool`): whether neighbouring draws are pairs.
    """
    count = len(losses)
    if estimator == Estimator.LEAVE_ONE_OUT:
        size = 2 if antithetic else 1
        groups = losses.view(-1, size).sum(1).repeat_interleave(size)
        advantages = losses - (losses.sum() - groups) / (count - size)
        return advantages @ deviations / count
    return (losses - baseline) @ deviations / (count - 1)


def cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate, which falls from 1 to 0 over `steps`, without warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
