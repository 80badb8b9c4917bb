"""Keep probabilities learned by forward passes: policy gradient over Bernoulli masks (arXiv 2406.10576)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .utils import seeded_generator


MOVING_AVERAGE, LEAVE_ONE_OUT = "moving_average", "leave_one_out"

# Inside the root that preconditions the gradient, as in the paper's code: finite at probabilities of 0 and 1.
ROOT_FLOOR = 1e-7


@dataclass(frozen=True)
class Budget:
    """Units that share one budget.

    Args:
        members (`Tensor[n]`, int64): their places in the vector of all probabilities.
        weights (`Tensor[n]`, float64): what one unit costs, positive: 1 to count units, or its parameters.
        limit (`float`): largest Σ weight · probability.
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


def sample_masks(
    probabilities: torch.Tensor, count: int, seed: Sequence[int], antithetic: bool = False
) -> torch.Tensor:
    """Draw `count` masks with independent entries, `[count, n]` float64 of 0 and 1.

    Args:
        probabilities (`Tensor[n]`, float64): chance of a 1.
        count (`int`): masks; with `antithetic` an even number, and neighbours come from one uniform draw and its
            complement.
        seed (sequence of `int`): the same seed gives the same masks.
        antithetic (`bool`, defaults to `False`): see `count`.
    """
    generator = seeded_generator(*seed)
    draws = count // 2 if antithetic else count
    uniform = torch.rand(draws, len(probabilities), generator=generator, dtype=torch.float64)
    if antithetic:
        uniform = torch.stack([uniform, 1 - uniform], dim=1).flatten(0, 1)
    return (uniform < probabilities).double()


def policy_gradient(
    probabilities: torch.Tensor,
    masks: torch.Tensor,
    losses: torch.Tensor,
    estimator: str,
    baseline: float = 0.0,
    antithetic: bool = False,
) -> torch.Tensor:
    """Return the preconditioned gradient `sqrt(s (1 - s)) ∇ E[L]`, estimated from a few masks: `[n]`, float64.

    `"leave_one_out"` takes as each mask's baseline the mean loss of the other masks (of other pairs, where they are
    antithetic: a partner's loss is not independent) and is unbiased. `"moving_average"` is the paper's, divided by
    N - 1: its baseline knows this step's losses, and batches of other difficulty shift it.

    Args:
        probabilities (`Tensor[n]`, float64): s.
        masks (`Tensor[N, n]`, float64): of 0 and 1.
        losses (`Tensor[N]`, float64): of the model under each mask, on the same tokens.
        estimator (`str`): `"leave_one_out"` or `"moving_average"`.
        baseline (`float`): of `"moving_average"`.
        antithetic (`bool`): neighbouring masks are pairs.
    """
    count = len(losses)
    if estimator == LEAVE_ONE_OUT:
        size = 2 if antithetic else 1
        groups = losses.view(-1, size).sum(1).repeat_interleave(size)
        advantages = losses - (losses.sum() - groups) / (count - size)
        divisor = count
    else:
        advantages = losses - baseline
        divisor = count - 1
    root = ((probabilities + ROOT_FLOOR) * (1 - probabilities + ROOT_FLOOR)).sqrt()
    return advantages @ (masks - probabilities) / root / divisor


def initial_probabilities(
    scores: Sequence[torch.Tensor], keep_rates: Sequence[float], how: str, seed: int
) -> torch.Tensor:
    """Turn the scores of every site into keep probabilities, `[n]` float64, whose mean is the site's keep rate.

    Args:
        scores (sequence of `Tensor[num_units]`): a metric's, site by site.
        keep_rates (sequence of `float`): mean probability asked for.
        how (`str`): `"sigmoid"` of the standardised scores, `"min_max"` scaled scores, `"constant"`, or `"random"`.
        seed (`int`): of `"random"`.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for values, rate in zip(scores, keep_rates):
        values = values.double()
        if how == "sigmoid":
            start = ((values - values.mean()) / values.std(correction=0).clamp_min(1e-30)).sigmoid()
        elif how == "min_max":
            start = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-30)
        elif how == "random":
            start = torch.rand(len(values), generator=generator, dtype=torch.float64)
        else:
            start = torch.zeros_like(values)
        found.append(_shifted_to_mean(start, rate))
    return torch.cat(found)


def _shifted_to_mean(values: torch.Tensor, mean: float) -> torch.Tensor:
    """Shift and clamp to [0, 1] so that the clamped values have the mean asked for."""
    low, high = -1.0 - float(values.max()), 1.0 - float(values.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((values + middle).clamp(0, 1).mean()) < mean else (low, middle)
    return (values + high).clamp(0, 1)


def cosine(step: int, steps: int) -> float:
    """Return the factor on the learning rate: from 1 to 0 over `steps`, without warm-up."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def entropy(probabilities: torch.Tensor) -> float:
    """Return the mean entropy of the masks' entries, in bits: 0 once every unit is decided."""
    s = probabilities.clamp(1e-12, 1 - 1e-12)
    return float(-(s * s.log2() + (1 - s) * (1 - s).log2()).mean())
