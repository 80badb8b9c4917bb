"""Budgets by quality: the smallest model within a limit of perplexity or divergence on held-out windows."""

import math
import re

import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig
from optimum_fwdprune.data.held_out import windows_and_held_out
from optimum_fwdprune.forward.reference import Reference
from optimum_fwdprune.planning import quality


@pytest.fixture
def windows():
    return torch.randint(0, tiny.VOCAB, (40, 16), generator=torch.Generator().manual_seed(1))


def parts_of(windows, config):
    """The windows that are calibrated on, and those that are measured on."""
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0))[: config.n_samples + 8]
    return windows_and_held_out(config.n_samples, lambda _more: Calibration(windows[drawn]))


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("llama_gqa_biases", {"max_divergence": 0.03}),
        ("gemma2", {"max_divergence": 0.003, "reconstruction_order": "independent"}),
        ("opt_pre_norm", {"max_divergence": 0.05, "kinds": ["sublayer"], "method": "block_influence"}),
        ("bloom", {"max_divergence": 0.005, "reconstruction": "none", "kinds": ["attention", "mlp"]}),
    ],
)
def test_the_largest_sparsity_within_the_limit_is_chosen(name, request_, windows):
    dense = tiny.make_model(name)
    config = PruningConfig(**request_, n_samples=16, seq_len=16)
    pruner = FwdPruner(dense)
    model = pruner.prune(config, windows, inplace=False)

    found = pruner.plan.metadata["scoring"]["quality"]
    calibrated, held_out = parts_of(windows, config)
    measured = Reference(dense, [held_out], 8).compare(model).divergence
    assert found["measured"] == pytest.approx(measured, rel=1e-3, abs=1e-6)
    assert 0 < measured <= config.max_divergence
    # The next sparsity that was tried is beyond the limit.
    beyond = min(sparsity for sparsity, value in found["tried"] if sparsity > found["sparsity"])
    assert beyond - found["sparsity"] <= quality.RESOLUTION + 1e-9
    assert dict(map(tuple, found["tried"]))[beyond] > config.max_divergence
    assert pruner.config == config
    # The model is that of the sparsity alone.
    plain = {key: value for key, value in request_.items() if key != "max_divergence"}
    alone = FwdPruner(dense).prune(PruningConfig(**plain, sparsity=found["sparsity"]), calibrated, inplace=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in alone.state_dict().items())


def test_perplexity_is_limited_as_a_ratio_to_the_dense_model(windows):
    dense = tiny.make_model("llama_gqa_biases")
    config = PruningConfig(max_perplexity_ratio=1.01, n_samples=16, seq_len=16, reconstruction="none")
    pruner = FwdPruner(dense)
    model = pruner.prune(config, windows, inplace=False)
    _, held_out = parts_of(windows, config)
    reference = Reference(dense, [held_out], 8)

    ratio = math.exp(reference.compare(model).loss - reference.dense.loss)
    assert ratio <= 1.01 and pruner.plan.metadata["scoring"]["quality"]["measured"] == pytest.approx(ratio, rel=1e-4)


def test_a_limit_that_cannot_be_met_names_the_nearest_that_can(windows):
    request = {"n_samples": 16, "seq_len": 16, "reconstruction": "none"}
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    with pytest.raises(ValueError, match="max_divergence=1e-09 cannot be met") as raised:
        pruner.prune(max_divergence=1e-9, dataset=windows, **request)
    nearest = float(re.search(r"met is max_divergence=([\d.e-]+);", str(raised.value))[1])
    pruner.prune(max_divergence=nearest, dataset=windows, **request)
    assert pruner.report.sparsity > 0


def test_measurements_are_not_repeated_after_an_interruption(windows, tmp_path, monkeypatch):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    request = {"max_divergence": 0.02, "n_samples": 16, "seq_len": 16, "resume": str(tmp_path), "resume_seconds": 0}
    compare, calls = Reference.compare, []

    def interrupted(reference, model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(reference, model)

    monkeypatch.setattr(Reference, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(dataset=windows, **request)
    pruner.prune(dataset=windows, **request)
    tried = pruner.plan.metadata["scoring"]["quality"]["tried"]
    # Equal plans are measured once.
    assert len(calls) == 1 + len({value for _, value in tried})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_bytes": 10}, "target_bytes and max_divergence are two budgets"),
        ({"max_perplexity_ratio": 1.1}, "max_perplexity_ratio and max_divergence are two budgets"),
        ({"mlp_sparsity": 0.3}, "two budgets"),
        ({"max_divergence": 0.0}, "max_divergence must be more than 0"),
        ({"max_divergence": None, "max_perplexity_ratio": 1.0}, "max_perplexity_ratio must be more than 1"),
        ({"rounds": 2}, "cannot be combined with rounds=2"),
        ({"scope": "search"}, "cannot be combined with scope='search'"),
        ({"method": "policy_gradient"}, "learns for a budget"),
    ],
)
def test_two_budgets_and_limits_without_a_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**{"max_divergence": 0.1, **fields})


def test_given_scores_are_refused_with_a_limit(windows):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    scores = pruner.score(dataset=windows)
    with pytest.raises(ValueError, match="Leave scores out"):
        pruner.prune(max_divergence=0.1, dataset=windows, scores=scores)
