"""Sweeps: every row is the model that `prune` makes alone, while the dense model runs once for all of them."""

import copy
import json
import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.evaluation import text_loss
from optimum_fwdprune.reconstruction.streams import Stream
from optimum_fwdprune.scoring import score_units
from optimum_fwdprune.sweep import Measures, SweepResult, SweepRow, sweeping
from optimum_fwdprune.sweep.measuring import HELD_OUT


TEXTS = {"fox": ["the quick brown fox jumps over the lazy dog " * 12]}
QUALITY = Measures(TEXTS, max_length=32, speed=False)


@pytest.fixture
def pruner(tokenizer):
    return FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)


# Least squares towards the dense stream, its sources too, over removed layers, and after norms; all at once.
REQUESTS = {
    "llama_gqa_biases": {"kinds": ["attention", "mlp"]},
    "llama_mha_tied": {"refit_sources": True, "method": ["wanda_sp", "flap"]},
    "opt_pre_norm": {"kinds": ["layer"], "method": "block_influence"},
    "gemma2": {"reconstruction": ["bias", "least_squares"]},
    "bloom": {"reconstruction_order": "independent"},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_model_is_the_one_that_prune_makes(name, tokenizer, tokens, tmp_path):
    dense, sizes = tiny.make_model(name), [0.35, 0.5]
    FwdPruner(dense, tokenizer).sweep(
        tmp_path / "s", None, tokens, measures=QUALITY, keep=sizes, sparsity=sizes, **REQUESTS[name]
    )

    rows = SweepResult.load(tmp_path / "s").rows
    assert len(rows) == 2 * max(
        len(value) if name in ("method", "reconstruction") and isinstance(value, list) else 1
        for name, value in REQUESTS[name].items()
    )
    for row in rows:
        alone = FwdPruner(dense).prune(PruningConfig.from_dict(row.request), tokens, inplace=False)
        swept = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / row.name)
        for key, value in alone.state_dict().items():
            assert torch.equal(swept.state_dict()[key], value), (row.name, key)


def test_the_dense_model_runs_once_for_all_sizes_and_methods(pruner, tokens, tmp_path, monkeypatch):
    passes = {"layers": 0, "statistics": 0}
    enter, gather = Stream.enter, score_units.gather_statistics

    def counted(stream, sites):
        passes["layers"] += 1
        enter(stream, sites)

    def gathered(*args):
        passes["statistics"] += 1
        return gather(*args)

    monkeypatch.setattr(Stream, "enter", counted)
    monkeypatch.setattr(score_units, "gather_statistics", gathered)
    pruner.sweep(
        tmp_path / "s",
        None,
        tokens,
        measures=QUALITY,
        sparsity=[0.2, 0.4, 0.5],
        method=["wanda_sp", "flap"],
        batch_size=16,
    )

    # Three layers, and one batch each of the windows to fit on and of those held out.
    assert passes == {"layers": 3 * 2, "statistics": 1}


def test_figures_are_those_of_the_checkpoint(pruner, tokenizer, tokens, tmp_path):
    dense = copy.deepcopy(pruner.model)
    result = pruner.sweep(tmp_path / "s", None, tokens, measures=QUALITY, sparsity=[0.2, 0.5], keep=[0.5])

    (row,) = (row for row in result.rows if row.name == "sparsity-0.5")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / row.name)
    ids = torch.tensor(tokenizer("".join(TEXTS["fox"]))["input_ids"])
    assert row.figures["perplexity, fox"] == pytest.approx(text_loss(kept, ids, 32).perplexity)
    assert result.dense["perplexity, fox"] == pytest.approx(text_loss(dense, ids, 32).perplexity)
    assert row.figures["parameters"] == kept.num_parameters() < result.dense["parameters"]
    terms = []
    with torch.no_grad():
        for window in ids.split(32):
            if len(window) < 2:
                continue
            every = slice(min(4, len(window)) - 1, None, min(4, len(window)))
            before, after = (model(window[None]).logits[0, every].double().log_softmax(-1) for model in (dense, kept))
            terms.append((before.exp() * (before - after)).sum(-1))
    assert row.figures["divergence, fox"] == pytest.approx(float(torch.cat(terms).mean()), rel=1e-4)
    assert SweepResult.load(tmp_path / "s").to_dict() == json.loads(json.dumps(result.to_dict()))
    assert (tmp_path / "s" / "plans" / "sparsity-0.2.json").is_file() and (tmp_path / "s" / "sweep.svg").is_file()


def test_windows_are_held_out_where_no_text_is_named(pruner, tmp_path):
    windows = torch.randint(0, tiny.VOCAB, (40, 16), generator=torch.Generator().manual_seed(1))
    result = pruner.sweep(
        tmp_path / "s", None, windows, measures=Measures(speed=False), sparsity=[0.3], n_samples=16, seq_len=16
    )

    (row,) = result.rows
    assert {f"perplexity, {HELD_OUT}", f"divergence, {HELD_OUT}"} <= row.figures.keys()
    (fingerprint,) = result.identity["texts"][HELD_OUT]
    assert row.calibration["fingerprint"] != fingerprint


def test_an_interrupted_sweep_continues_with_the_next_row(pruner, tokens, tmp_path, monkeypatch):
    request = {"dataset": tokens, "measures": QUALITY, "sparsity": [0.2, 0.3, 0.5]}
    whole = pruner.sweep(tmp_path / "whole", **request)
    measure, measured = sweeping.Meter.measure, []

    def interrupted(meter, name, model):
        measured.append(name)
        if measured == ["sparsity-0.2", "sparsity-0.3"]:
            raise KeyboardInterrupt
        return measure(meter, name, model)

    monkeypatch.setattr(sweeping.Meter, "measure", interrupted)
    before = copy.deepcopy(pruner.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        pruner.sweep(tmp_path / "s", **request)
    assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())
    assert pruner.plan is None and pruner.report is None and not hasattr(pruner.model, "pruning_record")
    assert [row.name for row in SweepResult.load(tmp_path / "s").rows] == ["sparsity-0.2"]

    result = pruner.sweep(tmp_path / "s", **request)
    assert measured == ["sparsity-0.2", "sparsity-0.3", "sparsity-0.3", "sparsity-0.5"]
    assert [row.figures for row in result.rows] == [row.figures for row in whole.rows]
    assert not (tmp_path / "s" / "state").exists()
    # Further sizes are added, and a checkpoint is made later; what was measured is not measured again.
    pruner.sweep(tmp_path / "s", **{**request, "sparsity": [0.4, 0.5]}, keep=[0.5])
    assert measured[4:] == ["sparsity-0.4", "sparsity-0.5"] and (tmp_path / "s" / "sparsity-0.5").is_dir()
    assert len(SweepResult.load(tmp_path / "s").rows) == 4


def test_the_folder_of_another_sweep_is_refused_and_left_as_it_was(pruner, tokens, tokenizer, tmp_path):
    request = {"dataset": tokens, "measures": QUALITY, "sparsity": [0.3]}
    pruner.sweep(tmp_path / "s", **request)
    before = (tmp_path / "s" / "sweep.json").read_bytes()
    others = {
        "its fox": {**request, "measures": Measures({"fox": ["the dog " * 20]}, max_length=32, speed=False)},
        "its budget": {"dataset": tokens, "measures": QUALITY, "target_bytes": [250_000]},
        "its ridge": {**request, "ridge": 0.1},
        "calibrated on tokens": {**request, "sparsity": [0.3, 0.4], "dataset": tokens[:12]},
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=f"holds another sweep.*{message}.*Name another folder"):
            pruner.sweep(tmp_path / "s", **other)
    with pytest.raises(ValueError, match="its model is"):
        FwdPruner(tiny.make_model("llama_gqa_biases", seed=1), tokenizer).sweep(tmp_path / "s", **request)
    assert (tmp_path / "s" / "sweep.json").read_bytes() == before


BAD = {
    "sparsity and target_bytes are two budgets": {"sparsity": [0.2], "target_bytes": [10**5]},
    "sparsity and max_divergence are two budgets": {"sparsity": [0.2], "max_divergence": 0.1},
    "A sweep needs sizes": {},
    "sparsity has no value": {"sparsity": []},
    "sparsity names 0.2 twice": {"sparsity": [0.2, 0.3, 0.2]},
    "keep=0.4 is none of the sizes of this sweep, which are 0.2, 0.3": {"sparsity": [0.2, 0.3], "keep": [0.4]},
    "the largest possible": {"sparsity": [0.2, 0.99]},
    "Several seeds": {"sparsity": [0.2], "seed": [0, 1], "measures": Measures(speed=False)},
    "leave out resume": {"sparsity": [0.2], "resume": "state"},
    "more than the 128 positions": {"sparsity": [0.2], "measures": Measures(TEXTS, max_length=32)},
    "max_length must be": {"sparsity": [0.2], "measures": Measures(TEXTS, max_length=129, speed=False)},
    "which is too few": {"sparsity": [0.2], "measures": Measures({"empty": [""]}, speed=False)},
    "must be one of": {"sparsity": [0.2], "method": ["wanda_sp", "wanda"]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_request_is_refused_before_anything_runs(message, pruner, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping.Pruning, "calibration", lambda *_: pytest.fail("it was calibrated"))
    with pytest.raises(ValueError, match=message):
        pruner.sweep(tmp_path / "s", None, tokens, **{"measures": QUALITY, **BAD[message]})
    assert not (tmp_path / "s").exists()


def test_options_go_to_the_methods_that_have_them(pruner, tokens, tmp_path):
    methods = {"method": ["wanda_sp", "mini_llm"], "draws": 3}
    result = pruner.sweep(tmp_path / "s", None, tokens, measures=QUALITY, sparsity=[0.3], **methods)
    assert [row.request.get("draws") for row in result.rows] == [None, 3]
    with pytest.raises(TypeError, match=r"draws.*mini_llm"):
        pruner.sweep(tmp_path / "t", None, tokens, sparsity=[0.3], draws=3)


def test_methods_that_learn_for_a_budget_learn_for_every_size(pruner, tokens, tmp_path, monkeypatch):
    scored, score = [], sweeping.Pruning.score

    def watched(pruning, config, evidence):
        scored.append((config.method, config.sparsity))
        return score(pruning, config, evidence)

    monkeypatch.setattr(sweeping.Pruning, "score", watched)
    request = {"method": ["policy_gradient", "magnitude"], "steps": 2, "reconstruction": "none"}
    pruner.sweep(tmp_path / "s", None, tokens, measures=QUALITY, sparsity=[0.2, 0.4], **request)
    assert scored == [("policy_gradient", 0.2), ("policy_gradient", 0.4), ("magnitude", 0.4)]


def test_the_front_holds_what_nothing_beats():
    def row(name, parameters, perplexity, speed):
        figures = {"parameters": parameters, "perplexity, t": perplexity, "decode 1 x 512, times as fast": speed}
        return SweepRow(name, {"sparsity": 0.1}, figures)

    rows = [row("a", 10, 5.0, 1.0), row("b", 8, 6.0, 1.2), row("c", 8, 7.0, 1.5), row("d", 6, 6.5, 1.1)]
    result = SweepResult("sparsity", {}, {}, rows)
    assert [row.name for row in result.front("perplexity, t", "parameters")] == ["a", "b", "d"]
    assert [row.name for row in result.front("perplexity, t", "decode 1 x 512, times as fast")] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="'perplexity, u' was not measured; the figures are 'parameters'"):
        result.front("perplexity, u", "parameters")
    assert math.isclose(rows[0].figures["perplexity, t"], 5.0)
