"""Gradient of an expected loss from forward passes, and the projection onto a budget (arXiv 2406.10576)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


MOVING_AVERAGE, LEAVE_ONE_OUT = "moving_average", "leave_one_out"


@dataclass(frozen=True)
class Budget:
    """Variables that share one budget: keep probabilities of units, or keep ratios of sites.

    Args:
        members (`Tensor[n]`, int64): their places in the vector of all variables.
        weights (`Tensor[n]`, float64): what a rate of 1 costs, positive: 1 to count units, or parameters.
        limit (`float`): largest Σ weight · rate.
    """

    members: torch.Tensor
    weights: torch.Tensor
    limit: float


def project(probabilities: torch.Tensor, weights: torch.Tensor, limit: float, floor: float = 0.0) -> torch.Tensor:
    """Return the nearest point of {floor ≤ s ≤ 1, Σ w s ≤ limit}: `clamp(s - v w, floor, 1)` with the smallest v ≥ 0.

    Exact: Σ w clamp(s - v w) is piecewise linear in v, so the piece that meets the limit is found by bisection over
    its corners and solved. The paper bisects v itself, with w = 1.

    Args:
        probabilities (`Tensor[n]`, float64): s, anywhere.
        weights (`Tensor[n]`, float64): w, positive.
        limit (`float`): at least Σ w · floor.
        floor (`float`, defaults to 0): a probability of exactly 0 would never come back.

    Raises:
        ValueError: where the limit is below what the floor alone takes.
    """
    if limit < floor * float(weights.sum()):
        raise ValueError(
            f"A floor of {floor:g} under every keep probability takes {floor * float(weights.sum()):g} of a budget of "
            f"{limit:g}; lower the floor or the sparsity."
        )

    def clamped(shift: torch.Tensor | float) -> torch.Tensor:
        return (probabilities - shift * weights).clamp(floor, 1)

    if float(weights @ clamped(0.0)) <= limit:
        return clamped(0.0)
    corners = torch.cat([(probabilities - 1) / weights, (probabilities - floor) / weights])
    corners = torch.cat([corners.new_zeros(1), corners[corners > 0]]).sort().values
    low, high = 0, len(corners) - 1
    # At the last corner everything lies on the floor, so the limit is met there.
    while high - low > 1:
        middle = (low + high) // 2
        if float(weights @ clamped(corners[middle])) > limit:
            low = middle
        else:
            high = middle
    above, below = float(weights @ clamped(corners[low])), float(weights @ clamped(corners[high]))
    share = (above - limit) / (above - below)
    return clamped(corners[low] + share * (corners[high] - corners[low]))


def policy_gradient(
    deviations: torch.Tensor,
    losses: torch.Tensor,
    estimator: str,
    baseline: float = 0.0,
    antithetic: bool = False,
) -> torch.Tensor:
    """Return the preconditioned gradient of the expected loss, estimated from a few draws: `[p]`, float64.

    A draw's score is its deviation from the mean divided by the standard deviation, so this is the gradient with
    respect to the means, times the standard deviations: `sqrt(s (1 - s)) ∇ E[L]` for masks with probabilities s.

    `"leave_one_out"` takes as each draw's baseline the mean loss of the other draws (of other pairs, where they are
    antithetic: a partner's loss is not independent) and is unbiased. `"moving_average"` is the paper's, divided by
    N - 1: its baseline knows this step's losses, and batches of other difficulty shift it.

    Args:
        deviations (`Tensor[N, p]`, float64): of every draw from the mean, in standard deviations.
        losses (`Tensor[N]`, float64): of the model under each draw, on the same tokens.
        estimator (`str`): `"leave_one_out"` or `"moving_average"`.
        baseline (`float`): of `"moving_average"`.
        antithetic (`bool`): neighbouring draws are pairs.
    """
    count = len(losses)
    if estimator == LEAVE_ONE_OUT:
        size = 2 if antithetic else 1
        groups = losses.view(-1, size).sum(1).repeat_interleave(size)
        advantages = losses - (losses.sum() - groups) / (count - size)
        return advantages @ deviations / count
    return (losses - baseline) @ deviations / (count - 1)


def cosine(step: int, steps: int) -> float:
    """Return the factor on the learning rate: from 1 to 0 over `steps`, without warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
