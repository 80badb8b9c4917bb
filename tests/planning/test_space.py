"""The models that a search may choose among: where it starts, what the budget allows, and what a removal saves."""

import pytest
import tiny
import torch

from optimum_fwdprune import PruningConfig, find_sites
from optimum_fwdprune.allocation.allocate import allocate
from optimum_fwdprune.allocation.budgets import Budget
from optimum_fwdprune.allocation.depth import depth_units
from optimum_fwdprune.planning.space import Choice, Space


def space_of(layers, removed, kind="layer"):
    """A space whose budget is the cost of `removed` layers, and in which the first layers score lowest."""
    sites = find_sites(tiny.make_model("llama_gqa_biases", num_hidden_layers=layers))
    config = PruningConfig(kinds=[kind, "attention", "mlp"], scope="search", budget="joint", skip_layers=[])
    budget = Budget(round(removed * sum(site.num_parameters for site in sites) / layers))
    scores = {site.key: torch.arange(site.num_units).float() for site in sites}
    scores |= {unit.key: torch.tensor([float(place)]) for place, unit in enumerate(depth_units(sites, kind))}

    def keep(values, request):
        return allocate(sites, values, request, budget, additive=False)

    return Space(sites, sites, scores, config, budget, keep), keep


@pytest.mark.parametrize(
    ("layers", "removed", "numbers"),
    [
        (4, 0.5, [0]),
        (4, 1.0, [0, 1]),
        (4, 2.5, [0, 1, 2]),
        (4, 3.5, [2, 3]),
        (13, 9.0, [0, 1, 3, 4, 5, 6, 8, 9]),
    ],
)
def test_it_starts_from_as_few_layers_as_the_budget_requires_to_as_many_as_it_allows(layers, removed, numbers):
    space, _ = space_of(layers, removed)

    assert space.starts() == [tuple(range(number)) for number in numbers]


def test_no_more_may_go_than_the_budget_removes():
    space, _ = space_of(4, 2.0)

    assert space.allows((0, 3)) and not space.allows((0, 1, 3))


def test_the_last_attention_may_not_go():
    space, _ = space_of(2, 1.5, "sublayer")

    assert space.allows((0, 1)) and space.allows((1, 3)) and not space.allows((0, 2))


def test_a_removal_saves_what_is_not_saved_yet_and_a_return_costs_the_whole():
    space, _ = space_of(4, 1.0)
    attention, mlp = (site.num_parameters for site in space.sites[:2])
    rates = torch.ones(8, dtype=torch.float64)
    rates[1] = 0.5

    assert space.saves(0, Choice(rates)) == attention + mlp // 2
    assert space.saves(1, Choice(rates)) == attention + mlp
    rates[:2] = 0
    assert space.saves(0, Choice(rates, (0,))) == -(attention + mlp)


def test_a_layer_comes_back_wider_than_the_others():
    space, _ = space_of(4, 1.5)
    before = space.even((0,))
    after = space.moved(before, (1,))

    assert after.gone == (1,) and not after.rates[2:4].any()
    assert after.rates[:2].min() > after.rates[4:].max() and after.rates[4:].max() < before.rates[2:].min()


def test_a_request_with_its_scores_keeps_what_a_choice_keeps():
    space, keep = space_of(4, 1.5)
    choice = space.even((2,))
    kept = keep(space.scores(choice), space.request(choice.gone))

    assert [len(kept[site.key]) for site in space.sites] == space.widths(choice).tolist()
    assert {site.layer for site in space.sites if not kept[site.key]} == {2}
