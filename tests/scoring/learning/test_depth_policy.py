"""Policy gradient over whole layers and sublayers."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.allocation.depth import depth_units
from optimum_fwdprune.scoring.learning import mask_learning
from optimum_fwdprune.scoring.learning.depth_policy import DepthPolicy
from optimum_fwdprune.scoring.learning.policies import MaskDraws
from optimum_fwdprune.scoring.learning.policy_gradient import RateBudget


def deep_model():
    return tiny.make_model("llama_gqa_biases", num_hidden_layers=5)


def request_of(**fields):
    share = {} if "target_parameters" in fields else {"sparsity": 0.4}
    return PruningConfig(
        "policy_gradient", **{"kinds": ["layer"], "steps": 40, "reconstruction": "none", **share, **fields}
    )


def gone_of(pruner):
    return {tuple(key) for key, kept in pruner.plan.kept.items() if not kept}


@pytest.mark.parametrize("kind", ["layer", "sublayer"])
def test_masks_open_or_close_a_layer_or_sublayer_as_a_whole(kind):
    sites = find_sites(deep_model())
    units = depth_units(sites, kind)
    rates = torch.linspace(0, 1, len(units), dtype=torch.float64)
    budget = RateBudget(torch.arange(len(units)), torch.ones_like(rates), len(units) / 2, torch.zeros_like(rates))
    policy = DepthPolicy(units, sites, budget)
    draws = policy.draw(rates, 4000, (0, 0))
    by_site = dict(
        zip([site.key for site in sites], draws.masks.split([site.num_units for site in sites], 1), strict=True)
    )

    assert draws.deviations.shape == (4000, len(units))
    for unit, rate in zip(units, rates.tolist()):
        columns = torch.cat([by_site[site.key] for site in unit.sites], dim=1)
        assert (columns == columns[:, :1]).all()
        assert float(columns[:, 0].mean()) == pytest.approx(rate, abs=0.04)
    assert policy.keep_probabilities(rates).shape == draws.masks.shape[1:]


@pytest.mark.parametrize("kind", ["layer", "sublayer"])
def test_it_learns_which_ones_matter_to_the_loss(tokens, monkeypatch, kind):
    """The loss counts how much of layers 1 and 3 is closed; the metric is chance."""

    def losses(self, masks, _windows):
        parts = masks.split(self._sizes, 1)
        matter = [part.mean(1) for site, part in zip(self._sites, parts) if site.layer in (1, 3)]
        return -torch.stack(matter).sum(0)

    monkeypatch.setattr(mask_learning._Learner, "_losses", losses)
    pruner = FwdPruner(deep_model())
    request = request_of(kinds=[kind], sparsity=0.6, steps=200, metric="random", masks_per_step=8, learning_rate=0.3)
    pruner.prune(request, tokens)

    assert gone_of(pruner) == {(layer, site) for layer in (0, 2, 4) for site in ("attention", "mlp")}
    assert pruner.report.masked_difference < 1e-4


def test_the_expected_number_of_layers_keeps_to_the_sparsity(tokens, monkeypatch):
    seen = []
    draw = DepthPolicy.draw

    def recorded(self, rates, *args) -> MaskDraws:
        seen.append(float(rates.sum()))
        return draw(self, rates, *args)

    monkeypatch.setattr(DepthPolicy, "draw", recorded)
    pruner = FwdPruner(deep_model())
    pruner.prune(request_of(learning_rate=0.5), tokens, inplace=False)

    assert len(seen) == 40 and max(seen) <= 3 + 1e-6
    assert len(gone_of(pruner)) == 2 * 2
    assert (pruner.scores.history["expected_sparsity"] >= 0.4 - 1e-3).all()
    assert {key.kind for key in pruner.scores.values} == {"layer"}


def test_without_steps_the_lowest_influence_goes(tokens):
    by_influence, learned = FwdPruner(deep_model()), FwdPruner(deep_model())
    by_influence.prune(method="block_influence", sparsity=0.4, dataset=tokens, reconstruction="none")
    learned.prune(request_of(steps=0), tokens)

    assert gone_of(learned) == gone_of(by_influence)


def test_skipped_layers_stay_and_targets_are_met(tokens):
    model = deep_model()
    target = int(0.75 * sum(parameter.numel() for parameter in model.parameters()))
    pruner = FwdPruner(model)
    pruner.prune(request_of(skip_layers=[0, 1], target_parameters=target, steps=5), tokens)

    assert {layer for layer, _ in gone_of(pruner)} <= {2, 3, 4}
    assert pruner.report.parameters_after <= target


def test_it_scores_layers_beside_another_method_for_channels(tokens):
    pruner = FwdPruner(deep_model())
    request = {"kinds": ["layer", "mlp"], "depth_method": "policy_gradient", "depth_sparsity": 0.2, "sparsity": 0.4}
    pruner.score(**request, dataset=tokens[:4])
    lowest = min(range(5), key=lambda layer: float(pruner.scores.values[layer, "layer"]))
    pruner.prune(**request, scores=pruner.scores, reconstruction="none")

    assert gone_of(pruner) == {(lowest, "attention"), (lowest, "mlp")}


def test_a_metric_that_scores_no_layers_is_refused():
    with pytest.raises(
        ValueError, match="metric must be one of block_influence, magnitude, random, removal_loss; got"
    ):
        request_of(metric="wanda_sp")
