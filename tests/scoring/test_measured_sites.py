"""Only the sites that a request may change are measured, and the result is the one of measuring all of them."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.architectures import find_sites
from optimum_fwdprune.forward import accumulators
from optimum_fwdprune.forward.accumulators import Accumulator
from optimum_fwdprune.scoring import score_units, scored


PRESETS = ["fast", "balanced", "best"]
INDEPENDENT = {"reconstruction_order": "independent"}


@pytest.fixture
def deep():
    """A model whose first and last two layers are unpruned by default."""
    return tiny.make_model("llama_gqa_biases", num_hidden_layers=12)


@pytest.fixture
def measured(monkeypatch):
    """The widths of all inputs that are added to moments, and to Gram matrices of the scoring pass."""
    widths = {"moments": [], "grams": []}
    add, add_products = Accumulator.add, accumulators.add_products

    def counted(self, inputs):
        widths["moments"].append(inputs.shape[-1])
        add(self, inputs)

    def counted_products(gram, values, **options):
        widths["grams"].append(values.shape[-1])
        add_products(gram, values, **options)

    monkeypatch.setattr(Accumulator, "add", counted)
    monkeypatch.setattr(accumulators, "add_products", counted_products)
    return widths


def widths_of(model):
    return [site.projection.in_features for site in find_sites(model)[:2]]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["wanda_sp", "flap"])
def test_attention_is_not_measured_where_only_channels_are_removed(preset, method, deep, tokens, measured):
    attention, mlp = widths_of(deep)
    FwdPruner(deep).prune(preset, tokens, method=method, sparsity=0.3, batch_size=16)
    # Independent least squares holds some windows out, which are a text of their own.
    passes = 2 if preset == "fast" else 1

    assert attention != mlp and measured["moments"] == [mlp] * 12 * passes
    # The first and last two layers are not refitted.
    assert measured["grams"] == ([mlp] * 8 * passes if preset == "fast" else [])


def test_attention_is_measured_where_heads_are_removed(deep, tokens, measured):
    FwdPruner(deep).prune("fast", tokens, kinds=["attention", "mlp"], sparsity=0.3, skip_layers=[], batch_size=16)

    assert measured["moments"] == measured["grams"] == widths_of(deep) * 12 * 2


@pytest.mark.parametrize("preset", PRESETS)
def test_plans_and_weights_are_those_of_measuring_every_site(preset, deep, tokens, monkeypatch):
    request = PruningConfig.from_preset(preset, sparsity=0.3)
    pruner, everything = FwdPruner(deep), FwdPruner(deep)
    pruner.prune(request, tokens, inplace=False)
    monkeypatch.setattr(scored, "scored_kinds", lambda _config: ["attention", "mlp"])
    monkeypatch.setattr(score_units, "_refitted_sites", lambda subject, _requests: subject.sites)
    everything.prune(request, tokens, inplace=False)

    assert len(everything.scores.values) == 2 * len(pruner.scores.values)
    assert pruner.plan.kept == everything.plan.kept
    for name, parameter in pruner.model.named_parameters():
        assert torch.equal(parameter, everything.model.get_parameter(name))


def test_scores_of_channels_do_not_choose_heads(deep, tokens):
    pruner = FwdPruner(deep)
    scores = pruner.score(PruningConfig(sparsity=0.3), tokens)

    assert {key.kind for key in scores.values} == {"mlp"}
    with pytest.raises(ValueError, match=r"made with kinds=\['mlp'\], and the request has kinds=\['attention', 'mlp'"):
        pruner.prune(scores=scores, sparsity=0.3, kinds=["attention", "mlp"])
    # The budget opens attention.
    with pytest.raises(ValueError, match=r"made with kinds=\['mlp'\], .*Score the units again with the kinds"):
        pruner.prune(scores=scores, sparsity=0.75)
    # Scores of both serve requests for one of them.
    scores = pruner.score(PruningConfig(sparsity=0.3, kinds=["attention", "mlp"]), tokens)
    pruner.prune(scores=scores, sparsity=0.3, kinds=["mlp"])
    assert not any(pruner.plan.removed(key) for key in pruner.plan.kept if key.kind == "attention")


def test_layers_that_the_scores_did_not_refit_are_measured_again(deep, tokens):
    pruner, alone = FwdPruner(deep), FwdPruner(deep)
    fast = PruningConfig.from_preset("fast", sparsity=0.3)
    pruner.prune(scores=pruner.score(fast, tokens), sparsity=0.3, skip_layers=[], **INDEPENDENT, inplace=False)
    alone.prune(fast, tokens, skip_layers=[], inplace=False)

    assert pruner.plan.kept == alone.plan.kept and pruner.plan.removed((0, "mlp"))
    for name, parameter in pruner.model.named_parameters():
        torch.testing.assert_close(parameter, alone.model.get_parameter(name), rtol=1e-4, atol=1e-5)
