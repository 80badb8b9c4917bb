"""The default amount of calibration text, and what becomes of it in records, sweeps and short text."""

import dataclasses

import pytest
import tiny
import tiny_mixtures
import torch

from optimum_fwdprune import Calibration, FwdPruner, Mixture, PruningConfig
from optimum_fwdprune.data import amount, text_windows
from optimum_fwdprune.data import load_calibration as module
from optimum_fwdprune.data.amount import Amount
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.planning import calibration_text, duration
from optimum_fwdprune.request.files import CONFIG_NAME
from optimum_fwdprune.sweep.measuring import Measures
from optimum_fwdprune.sweep.result import SweepResult


TEXTS = [f"the quick brown fox number {number} jumps over the lazy dog" for number in range(60)]


@pytest.fixture
def model():
    return tiny.make_model("llama_gqa_biases")


@pytest.fixture
def narrow(monkeypatch):
    """Amounts of a size that suits tiny models, of which the MLP has 64 channels: 8 windows of 16 tokens at least."""
    monkeypatch.setattr(amount, "FEWEST_WINDOWS", 8)
    monkeypatch.setattr(amount, "TOKENS_PER_FEATURE", 4)


def of_width(features, **request):
    model = tiny.make_model("llama_gqa_biases", intermediate_size=features)
    return Amount.of(PruningConfig(**request), model)


@pytest.mark.parametrize(
    ("features", "windows"),
    # SmolLM2-135M, Gemma 3 270M, Qwen2.5-0.5B, and models of 8 and 70 billion parameters.
    [(1536, 128), (2048, 128), (4864, 304), (14336, 896), (28672, 1024)],
)
def test_the_default_follows_the_widest_projection_up_to_a_limit(features, windows):
    assert of_width(features).windows == windows
    # Windows of twice the length are half as many, and never fewer than 128.
    assert of_width(features, seq_len=512).windows == max(128, windows // 2)


def test_a_number_is_taken_as_it_is():
    assert of_width(28672, n_samples=3) == Amount(3) and not of_width(28672, n_samples=128).is_default


def test_only_projections_that_are_refitted_count(narrow):
    model = tiny.make_model("llama_gqa_biases")
    attention, mlp = (site.projection.in_features for site in tiny_sites(model))

    def features(**request):
        return Amount.of(PruningConfig(**request, seq_len=1), model).features

    assert (attention, mlp) == (48, 64) and features() == mlp
    assert features(kinds=["attention"], reconstruction_order="independent") == attention
    # In sequence, the MLP compensates for heads; before removed layers everything compensates.
    assert features(kinds=["attention"]) == mlp
    assert features(kinds=["attention", "layer"], depth_sparsity=0.3, reconstruction_order="independent") == mlp
    assert features(reconstruction="none") is None and features(reconstruction="bias") is None


def tiny_sites(model):
    from optimum_fwdprune.architectures import find_sites

    return find_sites(model)[:2]


def test_an_expert_sees_the_tokens_that_are_routed_to_it(narrow):
    model = tiny_mixtures.make_mixture("qwen3_moe")
    request = PruningConfig("reap", kinds=["expert"], seq_len=1)

    # 16 features; 2 of 8 experts are chosen for a token.
    assert Amount.of(request, model).features == 16 * 8 // 2


def load(model, tokenizer, dataset=None, **request):
    return load_calibration(PruningConfig(seq_len=16, **request), model, tokenizer, dataset)


def test_short_text_is_used_as_it_is_by_default_and_refused_where_a_number_asks_for_more(
    narrow, model, tokenizer, monkeypatch
):
    said = []
    monkeypatch.setattr(text_windows.logger, "warning", lambda text, *args: said.append(text % args))
    short = TEXTS[:12]
    found = load(model, tokenizer, short)

    assert 0 < len(found) < Amount.of(PruningConfig(seq_len=16), model).windows == 16
    assert said == [
        f"strings has {len(found)} windows of 16 tokens, and the default number for this model is 16; all of them are "
        f"used. Name more text, or set n_samples."
    ]
    with pytest.raises(ValueError, match=rf"it has {len(found)} windows of 16 tokens, and n_samples is 16"):
        load(model, tokenizer, short, n_samples=16)
    # The number that was used gives the same windows.
    assert torch.equal(load(model, tokenizer, short, n_samples=len(found)).input_ids, found.input_ids)
    with pytest.raises(ValueError, match="has 0 windows of 16 tokens"):
        load(model, tokenizer, ["too short"])


def test_a_short_source_of_a_mixture_gives_what_it_has(narrow, model, tokenizer):
    few = {"input_ids": [[1] * 16] * 3}
    many = {"input_ids": [[2] * 16] * 60}
    found = load(model, tokenizer, Mixture([few, many, TEXTS[:4]], [1, 1, 2]))

    assert (found.input_ids == 1).all(1).sum() == 3 and (found.input_ids == 2).all(1).sum() == 4
    assert 7 < len(found) < 7 + 8
    with pytest.raises(ValueError, match="has 3 windows, and its share of n_samples is 8"):
        load(model, tokenizer, Mixture([few, many], [1, 1]), n_samples=16)


@pytest.mark.parametrize("preset", ["fast", "balanced", "flap-paper"])
def test_the_record_has_the_number_that_was_used(preset, narrow, model, tokenizer, tmp_path):
    request = {"sparsity": 0.3, "seq_len": 16, "calibration": "builtin", "inplace": False}
    default = {"flap-paper": 1024}.get(preset, 16)
    if preset == "flap-paper":
        request |= {"n_samples": 5}
        default = 5
    pruner = FwdPruner(model, tokenizer)
    pruner.prune(preset, **request)
    pruner.save_pretrained(tmp_path)

    assert pruner.config.n_samples == default
    assert PruningConfig.from_pretrained(tmp_path).n_samples == default
    assert pruner.scores.config.n_samples == default == len(pruner.scores.calibration)
    # The record gives the same model, also once the default is another.
    again = FwdPruner(model, tokenizer)
    again.prune(pruner.config, inplace=False)
    assert again.plan.kept == pruner.plan.kept
    for name, parameter in pruner.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name))


def test_the_record_has_the_number_of_data_in_memory(narrow, model, tokens):
    pruner = FwdPruner(model)
    pruner.prune("fast", Calibration(tokens[:5]), sparsity=0.3)

    assert pruner.config.n_samples == 5


def test_a_run_without_text_leaves_the_number_open(model):
    pruner = FwdPruner(model)
    pruner.prune(method="random", reconstruction="none", sparsity=0.3)

    assert pruner.config.n_samples == "auto"


def test_scores_without_a_number_serve_requests_without_a_number(narrow, model, tokenizer, caplog):
    pruner = FwdPruner(model, tokenizer)
    scores = pruner.score(PruningConfig(seq_len=16, calibration="builtin", sparsity=0.5))
    pruner.prune(PruningConfig(sparsity=0.3, seq_len=16), scores=scores)

    assert pruner.config.n_samples == 16 and not any("scores" in message for message in caplog.messages)


def test_interrupted_runs_resume_with_the_default(narrow, model, tokenizer, tmp_path, monkeypatch):
    request = PruningConfig(sparsity=0.3, seq_len=16, calibration="self", resume=str(tmp_path), resume_seconds=0)
    monkeypatch.setattr("optimum_fwdprune.planning.run.cut", None)
    with pytest.raises(TypeError):
        FwdPruner(model, tokenizer).prune(request, inplace=False)
    monkeypatch.undo()
    monkeypatch.setattr(amount, "FEWEST_WINDOWS", 8)
    monkeypatch.setattr(amount, "TOKENS_PER_FEATURE", 4)
    # What was sampled before is not sampled again.
    monkeypatch.setattr(type(model), "generate", None)
    pruner = FwdPruner(model, tokenizer)
    pruner.prune(request, inplace=False)
    assert pruner.config.n_samples == 16


def test_sweeps_tell_the_number_of_windows_and_resume(narrow, model, tokenizer, tmp_path):
    sweep = {"sparsity": [0.2, 0.4], "seq_len": 16, "calibration": "builtin", "keep": [0.4]}
    # Without refitting the default is smaller, and all models share the text of the largest.
    sweep |= {"reconstruction": ["none", "least_squares"], "measures": Measures(speed=False)}
    result = FwdPruner(model, tokenizer).sweep(tmp_path, **sweep)

    assert [row.calibration["windows"] for row in result.rows] == [16] * 4
    stored = SweepResult.load(tmp_path)
    assert [dataclasses.asdict(row) for row in stored.rows] == [dataclasses.asdict(row) for row in result.rows]
    again = FwdPruner(model, tokenizer).sweep(tmp_path, **sweep)
    assert [row.seconds for row in again.rows] == [row.seconds for row in result.rows]
    for checkpoint in tmp_path.glob(f"*/{CONFIG_NAME}"):
        assert PruningConfig.from_pretrained(checkpoint.parent).n_samples == 16


def test_windows_are_held_out_of_the_default_number(narrow, model, tokenizer):
    pruner = FwdPruner(model, tokenizer)
    pruner.prune(max_divergence=0.05, seq_len=16, calibration="builtin", inplace=False)

    assert pruner.config.n_samples == len(pruner.scores.calibration) == 16


def test_the_amount_and_the_expected_time_are_announced_once(narrow, model, tokenizer, monkeypatch):
    events, estimated = [], []
    monkeypatch.setattr(calibration_text, "announce", events.append)
    monkeypatch.setattr(duration, "announce", events.append)
    monkeypatch.setattr(duration, "is_silent", lambda: False)
    monkeypatch.setattr(duration, "FEWEST_PRODUCTS", 48 * model.num_parameters())

    def seconds(_subject, config, _kept, calibration, _device, _processes):
        estimated.append((config.n_samples, len(calibration)))
        return {"score": 50.0, "reconstruct": 180.0}

    monkeypatch.setattr(duration, "estimated_seconds", seconds)
    stages = "50 seconds to score, 3 minutes to reconstruct"
    time = f"The run takes about 4 minutes on this machine ({stages}), without loading, checks and saving."
    FwdPruner(model, tokenizer).prune(sparsity=0.3, seq_len=16, calibration="builtin", rounds=2, inplace=False)

    assert events == [
        "Calibration uses 16 windows of 16 tokens, 256 tokens in all, 4 for each of 64 features of the widest "
        "projection that may be refitted, and at most 262,144; set n_samples to use another amount.",
        time,
    ]
    events.clear()
    request = {"n_samples": 3, "seq_len": 16, "calibration": "builtin", "reconstruction_order": "independent"}
    FwdPruner(model, tokenizer).prune(sparsity=0.3, **request)
    assert events == ["Calibration uses 3 windows of 16 tokens, 48 tokens in all.", time]
    assert estimated == [(16, 16), (3, 3)]


@pytest.mark.parametrize(("silent", "windows"), [(True, 16), (False, 15)])
def test_nothing_is_timed_where_progress_is_not_shown_or_the_run_is_short(
    narrow, model, tokenizer, monkeypatch, silent, windows
):
    monkeypatch.setattr(duration, "FEWEST_PRODUCTS", 16 * windows * model.num_parameters() + (not silent))
    monkeypatch.setattr(duration, "is_silent", lambda: silent)
    monkeypatch.setattr(duration, "estimated_seconds", None)

    FwdPruner(model, tokenizer).prune(sparsity=0.3, seq_len=16, n_samples=windows, calibration="builtin")


def test_a_dry_run_has_the_default_amount(narrow, model, tokenizer):
    for source in ("builtin", "self"):
        found = FwdPruner(model, tokenizer).dry_run(sparsity=0.3, seq_len=16, calibration=source)
        assert found.request.n_samples == 16


def test_the_text_that_is_read_has_the_default_amount(model, tokenizer):
    assert len(load_calibration(PruningConfig(calibration="builtin", seq_len=8), model, tokenizer)) == 128
    assert module.Amount is Amount
