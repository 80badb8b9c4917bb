"""The parts of policy-gradient pruning against optimisation and enumeration."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optimum_fwdprune.scoring.learning import policy_gradient as module
from optimum_fwdprune.scoring.learning.policies import standardized
from optimum_fwdprune.scoring.learning.policy_gradient import RateBudget, policy_gradient, project


numbers = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-2, 3), min_size=n, max_size=n),
        st.lists(st.floats(0.05, 5), min_size=n, max_size=n),
        st.floats(0.0, 1.0),
        st.sampled_from([0.0, 0.01, 0.2]),
    )
)


def budget(weights, limit, floor, exact=False):
    return RateBudget(torch.arange(len(weights)), weights, limit, torch.full_like(weights, floor), exact)


@settings(max_examples=60, deadline=None)
@given(numbers, st.booleans())
@example(([0.0, 0.0], [1.0, 1.0], 0.9999999999999999, 0.2), False)
def test_an_exact_budget_is_met_at_the_nearest_point(problem, weighted):
    from scipy.optimize import brentq

    values, weights, share, floor = problem
    s = torch.tensor(values, dtype=torch.float64)
    w = torch.tensor(weights, dtype=torch.float64) if weighted else torch.ones_like(s)
    limit = float(w.sum()) * (floor + share * (1 - floor))
    found = project(s, budget(w, limit, floor, exact=True)).numpy()

    def excess(multiplier):
        return w.numpy() @ np.clip(s.numpy() - multiplier * w.numpy(), floor, 1) - limit

    assert w.numpy() @ found == pytest.approx(limit, abs=1e-9)
    # Either sign of the multiplier; beyond these ends everything is on a bound.
    low, high = float(((s - 1) / w).min()) - 1, float(((s - floor) / w).max()) + 1
    # A share of all but one bit may round to all, which an end meets exactly.
    nearest_end = min(low, high, key=lambda end: abs(excess(end)))
    multiplier = brentq(excess, low, high, xtol=1e-14) if excess(low) * excess(high) < 0 else nearest_end
    if 0 < share < 1:
        np.testing.assert_allclose(found, np.clip(s.numpy() - multiplier * w.numpy(), floor, 1), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(numbers, st.booleans())
def test_the_projection_solves_its_quadratic_program(problem, weighted):
    """Against scipy's solution, weighted and not."""
    from scipy.optimize import minimize

    values, weights, share, floor = problem
    s = torch.tensor(values, dtype=torch.float64)
    w = torch.tensor(weights, dtype=torch.float64) if weighted else torch.ones_like(s)
    limit = float(w.sum()) * (floor + share * (1 - floor)) + 1e-9
    found = project(s, budget(w, limit, floor)).numpy()
    solution = minimize(
        lambda x: 0.5 * np.square(x - s.numpy()).sum(),
        np.full(len(s), floor),
        jac=lambda x: x - s.numpy(),
        bounds=[(floor, 1)] * len(s),
        constraints={"type": "ineq", "fun": lambda x: limit - w.numpy() @ x, "jac": lambda x: -w.numpy()},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )

    assert floor - 1e-12 <= found.min() and found.max() <= 1 + 1e-12
    assert w.numpy() @ found <= limit + 1e-9
    # Nothing that fits is nearer. The nearest point is unique, but SLSQP stops up to a percent short of it.
    assert np.square(found - s.numpy()).sum() <= np.square(solution.x - s.numpy()).sum() + 1e-9
    np.testing.assert_allclose(found, solve_dual(s.numpy(), w.numpy(), limit, floor), atol=1e-6)


def solve_dual(s, w, limit, floor):
    """The same program through its one multiplier, which scipy finds as a root."""
    from scipy.optimize import brentq

    def point(multiplier):
        return np.clip(s - multiplier * w, floor, 1)

    if w @ point(0) <= limit:
        return point(0)
    highest = float(((s - floor) / w).max())
    return point(brentq(lambda multiplier: w @ point(multiplier) - limit, 0, highest, xtol=1e-14, rtol=1e-14))


def test_a_limit_below_the_floor_is_refused():
    with pytest.raises(ValueError, match=r"cost 1, which exceeds the budget of 0\.9\. Choose a lower sparsity"):
        project(torch.ones(5, dtype=torch.float64), budget(torch.ones(5, dtype=torch.float64), 0.9, 0.2))


# A loss with interactions, so that no first-order argument makes an estimator look right.
S = torch.tensor([0.2, 0.55, 0.9], dtype=torch.float64)
MASKS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)


def loss_of(mask):
    return 3 - mask[0] + 2 * mask[1] * mask[2] - 0.7 * mask[0] * mask[2] + 5 * mask.prod()


def probability_of(mask):
    return float(torch.where(mask == 1, S, 1 - S).prod())


def preconditioned_gradient():
    """sqrt(s (1 - s)) times the gradient of E[L], by autograd through the sum over all masks."""
    s = S.clone().requires_grad_(True)
    expected = sum(torch.where(mask == 1, s, 1 - s).prod() * loss_of(mask) for mask in MASKS)
    expected.backward()
    return (S * (1 - S)).sqrt() * s.grad


@pytest.mark.parametrize("count", [2, 3])
def test_leave_one_out_is_the_preconditioned_gradient(count):
    """Its expectation over all combinations of masks, exactly."""
    total = torch.zeros(3, dtype=torch.float64)
    for combination in itertools.product(MASKS, repeat=count):
        masks = torch.stack(combination)
        losses = torch.stack([loss_of(mask) for mask in masks])
        weight = np.prod([probability_of(mask) for mask in masks])
        total += weight * policy_gradient(standardized(masks, S), losses, "leave_one_out")

    torch.testing.assert_close(total, preconditioned_gradient(), rtol=1e-5, atol=1e-6)


def test_leave_one_out_of_two_masks_is_the_difference_of_their_losses():
    masks = MASKS[[1, 6]]
    losses = torch.tensor([2.0, 5.0], dtype=torch.float64)
    expected = (losses[0] - losses[1]) * (masks[0] - masks[1]) / 2 / (S * (1 - S)).sqrt()

    torch.testing.assert_close(
        policy_gradient(standardized(masks, S), losses, "leave_one_out"), expected, rtol=1e-5, atol=1e-6
    )


def test_antithetic_pairs_are_unbiased_with_the_other_pairs_as_baseline():
    pairs = []
    for mask in MASKS:
        for partner in MASKS:
            both, neither = (2 * S - 1).clamp_min(0), (1 - 2 * S).clamp_min(0)
            either = torch.minimum(S, 1 - S)
            entries = torch.where(mask == partner, torch.where(mask == 1, both, neither), either)
            if float(entries.prod()) > 0:
                pairs.append((float(entries.prod()), torch.stack([mask, partner])))
    assert sum(weight for weight, _ in pairs) == pytest.approx(1)
    total = torch.zeros(3, dtype=torch.float64)
    for (first, one), (second, two) in itertools.product(pairs, repeat=2):
        masks = torch.cat([one, two])
        losses = torch.stack([loss_of(mask) for mask in masks])
        total += first * second * policy_gradient(standardized(masks, S), losses, "leave_one_out", antithetic=True)

    torch.testing.assert_close(total, preconditioned_gradient(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("count", "horizon"), [(2, 5.0), (3, 2.0)])
def test_the_moving_average_scales_the_gradient(count, horizon):
    """By N (1 - 1 / (T N)) / (N - 1), 1.8 for the paper's N = 2 and T = 5: its baseline contains these very losses."""
    total = torch.zeros(3, dtype=torch.float64)
    for combination in itertools.product(MASKS, repeat=count):
        masks = torch.stack(combination)
        losses = torch.stack([loss_of(mask) for mask in masks])
        baseline = (1 - 1 / horizon) * 3.3 + float(losses.mean()) / horizon
        weight = np.prod([probability_of(mask) for mask in masks])
        total += weight * policy_gradient(standardized(masks, S), losses, "moving_average", baseline)
    factor = count * (1 - 1 / (horizon * count)) / (count - 1)

    torch.testing.assert_close(total, factor * preconditioned_gradient(), rtol=1e-5, atol=1e-6)


def test_the_schedule_falls_from_one_to_zero():
    assert module.cosine(0, 10) == 1
    assert module.cosine(5, 10) == pytest.approx(0.5)
    assert module.cosine(10, 10) == pytest.approx(0)
