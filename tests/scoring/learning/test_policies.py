"""What masks are drawn from: their distributions, budgets and constraints, and where learning starts."""

import pytest
import tiny
import torch

from optimum_fwdprune import find_sites
from optimum_fwdprune.allocation.allocate import allocate
from optimum_fwdprune.allocation.budgets import Budget as Removal
from optimum_fwdprune.scoring.learning.policies import (
    RatioPolicy,
    Ratios,
    UnitPolicy,
    entropy,
    initial_probabilities,
)
from optimum_fwdprune.scoring.learning.policy_gradient import RateBudget, policy_gradient


def test_decided_units_give_no_nan():
    s = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    deviations = UnitPolicy([], []).draw(s, 4, (0,)).deviations
    assert policy_gradient(deviations, torch.rand(4, dtype=torch.float64), "leave_one_out").isfinite().all()


@pytest.mark.parametrize("antithetic", [False, True])
def test_masks_have_the_probabilities_asked_for_and_follow_their_seed(antithetic):
    s = torch.linspace(0, 1, 11, dtype=torch.float64)

    def sample(*seed):
        return UnitPolicy([], []).draw(s, 4, seed, antithetic).masks

    masks = torch.cat([sample(0, step) for step in range(2000)])

    assert set(masks.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(masks.mean(0), s, rtol=0, atol=0.02)
    assert torch.equal(sample(3, 5), sample(3, 5))
    assert not torch.equal(sample(3, 5), sample(3, 6))
    # Partners disagree wherever both of s and 1 - s allow it.
    agreement = (masks[::2] == masks[1::2]).double().mean(0)
    expected = (2 * s - 1).abs() if antithetic else s.square() + (1 - s).square()
    torch.testing.assert_close(agreement, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("how", ["sigmoid", "min_max", "constant", "random"])
def test_initial_probabilities_have_the_keep_rate_of_every_site(how):
    scores = [torch.tensor([1.0, 5.0, 2.0, 100.0]), torch.full((6,), 3.0), torch.arange(9.0)]
    rates = [0.5, 0.7, 0.15]
    found = initial_probabilities(scores, rates, how, seed=0).split([4, 6, 9])
    for values, part, rate in zip(scores, found, rates):
        assert part.min() >= 0 and part.max() <= 1
        assert float(part.mean()) == pytest.approx(rate, abs=1e-9)
        if how in ("sigmoid", "min_max"):
            assert (part[values.argsort()].diff() >= 0).all()
        if how == "constant":
            assert float(part.std()) < 1e-9


def test_entropy_is_one_bit_per_coin_and_nothing_for_what_is_decided():
    assert entropy(torch.full((4,), 0.5, dtype=torch.float64)) == pytest.approx(1)
    assert entropy(torch.tensor([0.0, 1.0], dtype=torch.float64)) == pytest.approx(0, abs=1e-9)


@pytest.fixture(params=["kv_group", "query_head"])
def sites(dense, request):
    return find_sites(dense, request.param)


def metric_of(sites):
    generator = torch.Generator().manual_seed(5)
    return {site.key: torch.rand(site.num_units, generator=generator) for site in sites}


def ratio_policy(sites, spread=0.1, budget="joint", **fields):
    """A policy over the ratios of `sites` at 40 %, and the rates it starts from."""
    request = tiny.request(scope="global", budget=budget, sparsity=0.4, **fields)
    removal = Removal(round(0.4 * sum(site.num_parameters for site in sites)))
    kinds = [""] if budget == "joint" else ["attention", "mlp"]
    budgets = []
    for kind in kinds:
        members = [place for place, site in enumerate(sites) if site.kind == kind or not kind]
        weights = torch.tensor([float(sites[place].num_parameters) for place in members], dtype=torch.float64)
        floors = torch.zeros_like(weights)
        budgets.append(RateBudget(torch.tensor(members), weights, 0.6 * float(weights.sum()), floors, exact=True))

    def keep(scores):
        return allocate(sites, scores, request, removal, additive=False)

    return RatioPolicy(Ratios(sites, metric_of(sites), keep), budgets, spread), torch.full((len(sites),), 0.6).double()


def parameters_of(masks, sites):
    parts = masks.split([site.num_units for site in sites], dim=-1)
    return sum(part.sum(-1) * site.unit_parameters for part, site in zip(parts, sites))


@pytest.mark.parametrize("budget", ["joint", "separate"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_every_mask_of_the_ratios_keeps_to_the_budget(sites, budget, antithetic):
    policy, rates = ratio_policy(sites, 0.2, budget)
    draws = policy.draw(rates, 20, (0, 1), antithetic)
    allowed = 0.6 * sum(site.num_parameters for site in sites)
    largest = max(site.unit_parameters for site in sites)

    assert (parameters_of(draws.masks, sites) - allowed).abs().max() <= largest
    for own in policy.budgets:
        assert (draws.deviations[:, own.members] @ own.weights).abs().max() < 1e-9 * float(own.weights.sum())
    assert len(draws.masks.unique(dim=0)) > 10
    assert torch.equal(draws.masks, policy.draw(rates, 20, (0, 1), antithetic).masks)
    if antithetic:
        assert torch.equal(draws.deviations[::2], -draws.deviations[1::2])


def test_masks_of_the_ratios_keep_the_best_of_every_site_and_obey_the_request(sites):
    policy, rates = ratio_policy(sites, 0.3, multiple_of=8, min_units_per_site=2)
    masks = policy.draw(rates, 12, (3,)).masks
    for site, part in zip(sites, masks.split([site.num_units for site in sites], dim=1)):
        # As many of every group, and of each group the best.
        groups = part.view(len(part), site.num_groups, -1)
        order = metric_of(sites)[site.key].view(site.num_groups, -1).argsort(descending=True)
        ranked = groups.gather(2, order.expand_as(groups))
        assert (ranked.diff(dim=2) <= 0).all()
        assert (ranked.sum(2) == ranked.sum(2)[:, :1]).all()
        assert part.sum(1).min() >= min(2, site.num_units)
        if site.kind == "mlp":
            assert (part.sum(1) % 8 == 0).all()
            assert len(part.sum(1).unique()) > 2


def drawing_alone(monkeypatch, **fields):
    """A policy whose masks are never made: thousands of draws are wanted for their deviations."""
    sites = find_sites(tiny.make_model("llama_gqa_biases"), "kv_group")
    policy, rates = ratio_policy(sites, **fields)
    monkeypatch.setattr(policy, "_mask", lambda _rates: torch.empty(0))
    return sites, policy, rates


def test_deviations_of_the_ratios_are_standard_normal_within_the_budget(monkeypatch):
    _, policy, rates = drawing_alone(monkeypatch)
    deviations = torch.cat([policy.draw(rates, 50, (step,)).deviations for step in range(60)])
    weights = policy.budgets[0].weights
    expected = torch.eye(len(weights), dtype=torch.float64) - weights.outer(weights) / (weights @ weights)

    torch.testing.assert_close(deviations.mean(0), torch.zeros_like(rates), rtol=0, atol=0.08)
    torch.testing.assert_close(deviations.T.cov(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_gradient_of_the_ratios_is_that_of_the_expected_loss(monkeypatch, antithetic):
    """Of a loss that is linear in the ratios: spread times its slope, within the budget."""
    sites, policy, rates = drawing_alone(monkeypatch, spread=0.1, budget="separate")
    slope = torch.linspace(-1, 2, len(sites), dtype=torch.float64)
    gradients = []
    for step in range(1500):
        deviations = policy.draw(rates, 4, (step,), antithetic).deviations
        losses = 3 + (rates + 0.1 * deviations) @ slope
        gradients.append(policy_gradient(deviations, losses, "leave_one_out", antithetic=antithetic))
    found = torch.stack(gradients)
    expected = 0.1 * slope
    for own in policy.budgets:
        weights = own.weights
        expected[own.members] -= weights * (weights @ expected[own.members]) / (weights @ weights)
    error = found.std(0) / len(found) ** 0.5

    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    assert (error < 0.01).all() and expected.abs().max() > 0.05


def test_scores_of_the_ratios_give_the_ratios_back(sites):
    policy, _ = ratio_policy(sites)
    rates = torch.linspace(0.3, 0.9, len(sites), dtype=torch.float64)
    sizes = [site.num_units for site in sites]
    for site, rate, scores, chances in zip(
        sites, rates, policy.scores(rates).split(sizes), policy.keep_probabilities(rates).split(sizes)
    ):
        # Rounded within every group.
        assert int((scores > 0).sum()) == pytest.approx(float(rate) * site.num_units, abs=0.5 * site.num_groups)
        assert torch.equal(scores > 0, chances > 0.5)
        metric = metric_of(sites)[site.key].view(site.num_groups, -1)
        assert torch.equal(scores.view(site.num_groups, -1).argsort(), metric.argsort())


def test_equal_ratios_do_not_pick_layers_by_their_number():
    """Where units are coarse, only some layers can round down: those whose next unit stands out least."""
    sites = [site for site in find_sites(tiny.make_model("llama_mha_tied")) if site.kind == "attention"]
    metric = {site.key: torch.linspace(1, 2, site.num_units) ** (site.layer + 1) for site in sites}
    removal = Removal(5 * sites[0].unit_parameters)

    def kept(order):
        ordered = {key: metric[order[key[0]], "attention"] for key in metric}
        request = tiny.request(scope="global", kinds=["attention"])
        weights = torch.ones(3, dtype=torch.float64)
        budget = RateBudget(torch.arange(3), weights, 2.0, 0 * weights, exact=True)
        policy = RatioPolicy(Ratios(sites, ordered, None), [budget], 0.1)
        scores = policy.scores(torch.full((3,), 13 / 18, dtype=torch.float64)).split(6)
        found = allocate(sites, dict(zip(metric, scores)), request, removal, additive=False)
        return [len(found[key]) for key in metric]

    assert sorted(kept([0, 1, 2])) == [4, 4, 5]
    assert kept([2, 1, 0]) == kept([0, 1, 2])[::-1]


@pytest.mark.parametrize("how", ["sigmoid", "min_max"])
def test_probabilities_follow_the_metric(how):
    scores = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    found = initial_probabilities([scores], [0.5], how, seed=0)

    assert found[scores.argsort()].diff().min() > 0.05
    if how == "sigmoid":
        # z-scores are symmetric here, so no shift is needed.
        expected = ((scores - 3) / scores.std(correction=0)).sigmoid().double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
