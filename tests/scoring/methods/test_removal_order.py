"""The order in which removal loss removes layers, and how much of it a request measures."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.scoring import removal


def scored(tokens, **fields):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=5))
    return pruner.score(method="removal_loss", kinds=["layer"], dataset=tokens, **fields)


@pytest.fixture
def measured(monkeypatch):
    """The divergence after the removal of every layer, in the first step and in the second one."""
    steps = [[0.5, 0.1, 0.4, 0.2, 0.3], [0.2, 0.0, 0.5, 0.1, 0.4], [0.3, 0.0, 0.2, 0.0, 0.1]]

    def losses_of(_divergence, gone, candidates):
        return [steps[len(gone)][unit.key.layer] for unit in candidates], 1.0

    monkeypatch.setattr(removal, "_measured", losses_of)


@pytest.mark.parametrize(
    ("sparsity", "removed", "order"),
    [(0.2, ["layer 1"], [1, 3, 4, 2, 0]), (0.4, ["layer 1", "layer 3"], [1, 3, 0, 4, 2])],
)
def test_layers_that_stay_are_ranked_by_their_last_measurement(sparsity, removed, order, tokens, measured):
    scores = scored(tokens, sparsity=sparsity)

    assert scores.details["removed"] == removed
    assert sorted(range(5), key=lambda layer: float(scores.values[layer, "layer"])) == order


def test_layers_that_are_skipped_are_not_removed_on_the_way(tokens, measured):
    assert scored(tokens, sparsity=0.4, skip_layers=[1]).details["removed"] == ["layer 3", "layer 0"]


def test_as_many_are_removed_as_a_target_requires(tokens, measured):
    dense = tiny.make_model("llama_gqa_biases", num_hidden_layers=5)
    layer, whole = (
        sum(parameter.numel() for parameter in part.parameters()) for part in (dense.model.layers[0], dense)
    )

    for layers, removed in ((0.9, ["layer 1"]), (1.9, ["layer 1", "layer 3"])):
        assert scored(tokens, target_parameters=whole - int(layers * layer)).details["removed"] == removed


@torch.no_grad()
def test_removals_are_measured_on_the_first_windows(tokens):
    few, alone = scored(tokens, removal_windows=3), scored(tokens[:3])

    assert few.details == alone.details
    assert few.details["divergence"] != scored(tokens).details["divergence"]
