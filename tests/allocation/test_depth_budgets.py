"""Budgets that layers take a part of: what is left for heads and channels, and what is named where it is too much."""

import re

import pytest
import tiny
import torch

from optimum_fwdprune import PruningConfig, find_sites
from optimum_fwdprune.allocation.allocate import allocate
from optimum_fwdprune.allocation.budgets import Budget, OutOfReach
from optimum_fwdprune.allocation.depth import depth_units


LAYERS = 4


@pytest.fixture(scope="module")
def sites():
    return find_sites(tiny.make_model("llama_gqa_biases", num_hidden_layers=LAYERS))


def kept_of(sites, layers, **fields):
    """What is kept where the budget is the cost of `layers` layers, of which the first ones score lowest."""
    fields = {"kinds": ["layer", "attention", "mlp"], "scope": "search", **fields}
    budget = Budget(round(layers * sum(site.num_parameters for site in sites) / LAYERS), at_least=True)
    scores = {site.key: torch.arange(site.num_units).float() for site in sites}
    scores |= {unit.key: torch.tensor([float(unit.key.layer)]) for unit in depth_units(sites, "layer")}
    return allocate(sites, scores, PruningConfig(**fields), budget)


def gone(sites, kept):
    return {site.layer for site in sites if not kept[site.key]}


@pytest.mark.parametrize(("layers", "lost"), [(1.0, {0}), (1.01, {0, 1}), (2.0, {0, 1})])
def test_no_layer_goes_beyond_a_target_that_is_met(sites, layers, lost):
    kept = kept_of(sites, layers, kinds=["layer"], method="random", scope=None, target_parameters=1)

    assert gone(sites, kept) == lost


def test_layers_that_are_more_than_the_budget_leave_no_other_site_to_prune(sites):
    kept = kept_of(sites, 1.5, depth_sparsity=0.5, skip_layers=[2, 3])

    assert gone(sites, kept) == {0, 1}
    assert all(len(kept[site.key]) == site.num_units for site in sites if site.layer > 1)


@pytest.mark.parametrize(("depth_sparsity", "lost"), [(0.25, {0}), (None, {0, 1, 2})])
def test_the_largest_share_that_is_named_includes_the_layers(depth_sparsity, lost, sites):
    with pytest.raises(OutOfReach, match=r"Removing 0\.999 of the prunable parameters") as caught:
        kept_of(sites, 0.999 * LAYERS, depth_sparsity=depth_sparsity)
    largest = float(re.search(r"largest possible sparsity is (0\.\d+)", str(caught.value))[1])

    assert gone(sites, kept_of(sites, largest * LAYERS, depth_sparsity=depth_sparsity)) == lost
    with pytest.raises(OutOfReach):
        kept_of(sites, (largest + 0.001) * LAYERS, depth_sparsity=depth_sparsity)


def test_every_layer_that_may_go_goes_where_the_budget_requires_it(sites):
    kept = kept_of(sites, 3.0, depth_sparsity=None, skip_layers=[3])

    assert gone(sites, kept) == {0, 1, 2}


def test_as_few_layers_go_as_the_budget_requires(sites):
    removed = [len(gone(sites, kept_of(sites, layers, depth_sparsity=None))) for layers in (0.5, 3.5, 3.8)]

    assert removed == [0, 2, 3]
