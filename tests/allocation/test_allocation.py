"""Budgets and constraints, on sites of random shapes."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_fwdprune.allocation.allocate import allocate
from optimum_fwdprune.allocation.budgets import Budget, removal_budget
from optimum_fwdprune.allocation.steps import convex
from optimum_fwdprune.architectures import SiteKey
from optimum_fwdprune.request.choices import WIDTH_KINDS


ATTENTION, MLP = WIDTH_KINDS

HEAD_COST, CHANNEL_COST = 40, 9
OTHERS = {"routing": None, "fixed": "", "idle_parameters": 0, "units_before": None}


def make_site(layer, kind, num_units, num_groups=1):
    """What allocation reads of a site."""
    cost = HEAD_COST if kind == ATTENTION else CHANNEL_COST
    linear = torch.nn.Linear(num_units, 1, bias=False)
    site = SimpleNamespace(layer=layer, kind=kind, num_units=num_units, unit_parameters=cost, num_groups=num_groups)
    return SimpleNamespace(
        **vars(site), num_parameters=num_units * cost, key=SiteKey(layer, kind), weight=linear.weight, **OTHERS
    )


@st.composite
def problems(draw):
    """Sites of 1 to 4 layers with scores that may tie, and the constraints of a request."""
    groups = draw(st.sampled_from([1, 2, 3]))
    sites = []
    for layer in range(draw(st.integers(1, 4))):
        sites.append(make_site(layer, ATTENTION, groups * draw(st.integers(1, 4)), groups))
        sites.append(make_site(layer, MLP, draw(st.integers(1, 40))))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([1, 3, 10**6]))
    scores = {site.key: torch.randint(levels, (site.num_units,), generator=generator).float() for site in sites}
    config = {
        "scope": draw(st.sampled_from(["layer", "global"])),
        "budget": draw(st.sampled_from(["separate", "joint"])),
        "multiple_of": draw(st.sampled_from([1, 1, 4])),
        "tensor_parallel": draw(st.sampled_from([1, 1, 2])),
        "min_units_per_site": draw(st.sampled_from([1, 1, 2, 5])),
        "kinds": draw(st.sampled_from([[ATTENTION, MLP], [MLP], [ATTENTION]])),
        "skip_layers": draw(st.sampled_from([[], [0], [-1]])),
        "sparsity": draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9])),
    }
    return sites, scores, tiny.request(**config)


def prunable(sites):
    return sum(site.num_units * site.unit_parameters for site in sites)


def removed(sites, kept):
    return sum((site.num_units - len(kept[site.key])) * site.unit_parameters for site in sites)


@settings(max_examples=400, deadline=None)
@given(problems(), st.booleans(), st.booleans())
def test_the_budget_is_met_or_refused_and_constraints_hold(problem, additive, at_least):
    sites, scores, config = problem
    budget = Budget(round(config.sparsity * prunable(sites)), at_least)
    try:
        kept = allocate(sites, scores, config, budget, additive)
    except ValueError as error:
        # The refusal names a sparsity that is within reach, and the constraint in the way.
        possible = float(str(error).partition("largest possible sparsity is ")[2].partition(". Reduce")[0])
        named = {"min_units_per_site", "multiple_of", "tensor_parallel", "skip_layers", "kinds"}
        assert possible < config.sparsity and any(f"{name}=" in str(error) for name in named)
        allocate(sites, scores, config, Budget(int(possible * prunable(sites)), at_least=False), additive)
        return

    layers = 1 + max(site.layer for site in sites)
    skipped = {layer % layers for layer in config.skip_layers}
    for site in sites:
        units = kept[site.key]
        assert units == sorted(set(units)) and all(0 <= unit < site.num_units for unit in units)
        if site.kind not in config.kinds or site.layer in skipped:
            assert len(units) == site.num_units
        elif len(units) < site.num_units:
            assert len(units) >= config.min_units_per_site
            assert site.kind == ATTENTION or len(units) % config.multiple_of == 0
            assert len(units) % config.tensor_parallel == 0
            per_group = torch.tensor(units).div(site.num_units // site.num_groups, rounding_mode="floor")
            counts = per_group.bincount(minlength=site.num_groups)
            assert (counts == counts[0]).all()
            for group in range(site.num_groups):
                members = torch.arange(site.num_units).view(site.num_groups, -1)[group]
                stays = torch.isin(members, torch.tensor(units))
                values = scores[site.key][members]
                # Lowest first.
                assert stays.all() or values[stays].min() >= values[~stays].max()
    pools = [sites]
    if config.scope == "layer":
        pools = [[site for site in sites if site.layer == layer] for layer in set(range(layers)) - skipped]
    for pool in pools:
        open_sites = [site for site in pool if site.kind in config.kinds and site.layer not in skipped]
        if not open_sites:
            continue
        share = prunable(open_sites) / prunable(
            [s for s in sites if s.kind in config.kinds and s.layer not in skipped]
        )
        target = budget.amount * share
        # The largest of the smallest steps that are left bounds the rounding.
        units = [
            math.lcm(config.tensor_parallel, config.multiple_of if site.kind == MLP else site.num_groups)
            for site in open_sites
        ]
        steps = [site.unit_parameters * step for site, step in zip(open_sites, units)]
        first = [site.num_units % step * site.unit_parameters for site, step in zip(open_sites, units)]
        slack = max([*steps, *first]) + 1
        assert abs(removed(pool, kept) - target) <= slack
    if at_least:
        assert removed(sites, kept) >= budget.amount


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 4), st.sampled_from(["layer", "global"]), st.floats(0.05, 0.6))
def test_with_channels_to_spare_the_budget_is_met_within_half_a_channel(layers, scope, sparsity):
    """Whole heads first, then channels for what they leave over."""
    sites = [make_site(layer, kind, units) for layer in range(layers) for kind, units in ((ATTENTION, 4), (MLP, 60))]
    scores = {site.key: torch.rand(site.num_units) for site in sites}
    budget = round(sparsity * prunable(sites))
    kept = allocate(sites, scores, tiny.request(scope=scope, sparsity=sparsity), Budget(budget))
    pools = [sites] if scope == "global" else [sites[2 * layer : 2 * layer + 2] for layer in range(layers)]

    for pool in pools:
        assert abs(removed(pool, kept) - budget * len(pool) / len(sites)) <= CHANNEL_COST / 2 + 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["separate", "joint"]), st.booleans(), st.floats(0.05, 0.8))
def test_layers_are_cut_alike_for_a_stock_checkpoint(seed, budget, additive, sparsity):
    """The lowest of each layer go, and how many of which kind the layers decide together."""
    generator = torch.Generator().manual_seed(seed)
    sites = [make_site(layer, *kind) for layer in range(3) for kind in ((ATTENTION, 6, 2), (MLP, 30))]
    scores = {site.key: torch.rand(site.num_units, generator=generator) * (1 + site.layer) for site in sites}
    config = tiny.request(layout="stock", budget=budget, sparsity=sparsity)
    kept = allocate(sites, scores, config, Budget(round(sparsity * prunable(sites))), additive)

    for kind in (ATTENTION, MLP):
        of_kind = [site for site in sites if site.kind == kind]
        assert len({len(kept[site.key]) for site in of_kind}) == 1
        for site in of_kind:
            grouped = scores[site.key].view(site.num_groups, -1)
            count = len(kept[site.key]) // site.num_groups
            expected = grouped.topk(count, dim=1).indices + torch.arange(site.num_groups)[:, None] * grouped.shape[1]
            assert kept[site.key] == sorted(expected.flatten().tolist())


def test_a_ceiling_holds_where_the_shares_of_layers_round_down():
    """A third of 28 is 9.33: rounded to one channel of 9 per layer, the model would be a parameter too large."""
    sites = [make_site(layer, MLP, 10) for layer in range(3)]
    scores = {site.key: torch.rand(10) for site in sites}
    kept = allocate(sites, scores, tiny.request(), Budget(28, at_least=True))

    assert removed(sites, kept) >= 28


def test_a_global_scope_takes_the_lowest_scores_wherever_they_are():
    sites = [make_site(0, MLP, 10), make_site(1, MLP, 10)]
    scores = {(0, MLP): torch.arange(10.0), (1, MLP): torch.arange(10.0) + 100}
    kept = allocate(sites, scores, tiny.request(scope="global"), Budget(5 * CHANNEL_COST))

    assert kept == {(0, MLP): [5, 6, 7, 8, 9], (1, MLP): list(range(10))}


@pytest.mark.parametrize(("additive", "heads_left"), [(True, 3), (False, 4)])
def test_units_of_unequal_size_compete_by_score_per_parameter_where_scores_add_up(additive, heads_left):
    sites = [make_site(0, ATTENTION, 4), make_site(0, MLP, 20)]
    # A head scores more than a channel, but less per parameter.
    scores = {(0, ATTENTION): torch.full((4,), 2.0), (0, MLP): torch.full((20,), 1.0)}
    kept = allocate(sites, scores, tiny.request(scope="global", budget="joint"), Budget(HEAD_COST), additive)

    assert len(kept[(0, ATTENTION)]) == heads_left


def test_a_step_that_opens_up_a_cheaper_one_becomes_one_with_it():
    # 1 for 1, then 1 for 9, 6 for 3, 1 for 9: 2 for 10, 7 for 12.
    lost, saved = torch.tensor([0.0, 1, 2, 8, 9]).double(), torch.tensor([0, 1, 10, 13, 22])
    assert convex(lost, saved).tolist() == [2, 4]
    assert convex(lost, torch.tensor([0, 1, 2, 3, 4])).tolist() == [1, 2, 4]
    assert convex(torch.tensor([0.0, 1, 2, 4]).double(), torch.tensor([0, 1, 2, 3])).tolist() == [1, 2, 3]


def test_two_budgets_of_their_own():
    sites = [make_site(layer, kind, 20) for layer in range(2) for kind in (ATTENTION, MLP)]
    scores = {site.key: torch.rand(20) for site in sites}
    config = tiny.request(attention_sparsity=0.1, mlp_sparsity=0.5)
    kept = allocate(sites, scores, config, Budget(0))

    assert [len(kept[site.key]) for site in sites] == [18, 10, 18, 10]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mlp_sparsity": 0.95},
            r"Removing 0\.95 of the mlp parameters .* the largest possible mlp_sparsity is 0\.75\.",
        ),
        # The other kind's share is that of the whole.
        ({"mlp_sparsity": 0.1, "sparsity": 0.9}, r"0\.9 of the attention parameters .* possible sparsity is 0\.75\."),
        ({"sparsity": 0.9}, r"0\.9 of the prunable parameters .* possible sparsity is 0\.75\."),
        (
            {"target_parameters": 1100},
            r"target_parameters=1,100, which removes 0\.9184 .* sparsity is 0\.75, for target_parameters=1,265\.",
        ),
        (
            {"target_bytes": 4100},
            r"target_bytes=4,100, which removes 0\.9949 .* sparsity is 0\.75, for target_bytes=5,060\.",
        ),
        (
            {"target_bytes": 400},
            r"target_bytes=400, where 4,080 belong to no unit that can be removed, .* for target_bytes=5,060\.",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_in_the_words_of_the_request(fields, message):
    sites = [make_site(layer, kind, 20) for layer in range(1) for kind in (ATTENTION, MLP)]
    config = tiny.request(min_units_per_site=5, **fields)
    budget = removal_budget(config, sites, 2000, 8000)
    with pytest.raises(ValueError, match=message):
        allocate(sites, {site.key: torch.rand(20) for site in sites}, config, budget)
    # What it names can be had.
    for unit, smallest in (("parameters", 1265), ("bytes", 5060)):
        request = tiny.request(min_units_per_site=5, **{f"target_{unit}": smallest})
        budget = removal_budget(request, sites, 2000, 8000)
        allocate(sites, {site.key: torch.rand(20) for site in sites}, request, budget)


def test_a_layer_that_does_not_exist_cannot_be_skipped():
    sites = [make_site(0, MLP, 4)]
    for layer in (1, -2):
        with pytest.raises(ValueError, match=f"skip_layers names layer {layer}; the model has layers 0 to 0"):
            allocate(sites, {(0, MLP): torch.rand(4)}, tiny.request(skip_layers=[layer]), Budget(0))


def test_a_target_is_a_ceiling_and_biases_that_reconstruction_adds_count():
    sites = [make_site(0, MLP, 20)]
    config = tiny.request(target_parameters=100)

    def budget(config, **added):
        found = removal_budget(config, sites, 400, 1600, **added)
        return found.amount, found.at_least

    assert budget(config) == (300, True)
    assert budget(config, added_parameters=7) == (307, True)
    # 4 bytes per float32 parameter, rounded up.
    assert budget(tiny.request(target_bytes=1597)) == (1, True)
    with pytest.raises(ValueError, match="target_parameters is 500, and the model has only 400 parameters"):
        removal_budget(tiny.request(target_parameters=500), sites, 400, 1600)


@pytest.mark.parametrize(
    ("layers", "fields", "spared"),
    [
        (12, {}, {0, 1, 10, 11}),
        (11, {}, set()),
        (12, {"scope": "global"}, set()),
        (12, {"skip_layers": []}, set()),
        (12, {"skip_layers": [3]}, {3}),
    ],
)
def test_deep_models_keep_their_ends_unless_the_request_says_otherwise(layers, fields, spared):
    sites = [make_site(layer, MLP, 10) for layer in range(layers)]
    kept = allocate(sites, {site.key: torch.arange(10.0) for site in sites}, tiny.request(**fields), Budget(300))
    assert {layer for layer in range(layers) if len(kept[(layer, MLP)]) == 10} == spared


def test_a_budget_that_the_ends_stand_in_the_way_of_names_them():
    sites = [make_site(layer, MLP, 10) for layer in range(12)]
    with pytest.raises(
        ValueError, match=r"skip_layers=\[0, 1, -2, -1\] \(the default .*: the largest possible sparsity is 0\.6"
    ):
        allocate(sites, {site.key: torch.rand(10) for site in sites}, tiny.request(), Budget(1000))
