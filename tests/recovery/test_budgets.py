"""Budgets of a training in tokens and in time: read as users write them, filled by the data, and kept."""

import json

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.recovery import RecoveryOptions, run_length, training_data
from optimum_fwdprune.recovery.amounts import Wanted
from optimum_fwdprune.recovery.budgets import in_words, seconds_of, steps_for_time, tokens_of


REQUEST = PruningConfig(method="magnitude", kinds=["attention", "mlp"], reconstruction="none", sparsity=0.4)


def arguments(tmp_path, **changes):
    values = {"output_dir": str(tmp_path / "training"), "max_length": 24, "per_device_train_batch_size": 4}
    return RecoveryArguments(**values | {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | changes)


@pytest.fixture
def pruner():
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(REQUEST)
    return pruner


@pytest.mark.parametrize(
    ("text", "tokens"), [("1M", 10**6), ("1.5m", 1500000), ("64K", 64000), ("250000", 250000), ("2_000", 2000)]
)
def test_tokens_are_read_as_users_write_them(text, tokens):
    assert tokens_of(text) == tokens


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("0.5h", 1800)]
)
def test_times_are_read_as_users_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "many"}, "tokens='many' is no number of tokens; write 500K, 1M or 250000"),
        ({"tokens": "0"}, "is no number of tokens"),
        ({"time": "30"}, "time='30' is no time; write 90s, 30m"),
        ({"time": ""}, "is no time"),
        ({"time": "30m", "tokens": "1M"}, "tokens='1M' cannot be combined with time='30m'"),
        ({"time": "30m", "max_steps": 3}, "time='30m' cannot be combined with max_steps=3"),
        ({"tokens": "1M", "num_train_epochs": 2}, "tokens='1M' cannot be combined with num_train_epochs=2"),
        ({"time": "30m", "mode": "block_distill"}, "time='30m' cannot be combined with mode='block_distill'"),
    ],
)
def test_what_is_no_budget_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize("mode", ["full", "distill", "block_distill"])
def test_as_many_tokens_are_read_as_are_paid_for(pruner, tokens, tmp_path, mode, capfd):
    """16 sequences of 24 tokens: twice the data is 8 steps of 4."""
    teacher = tiny.make_model("llama_gqa_biases") if "distill" in mode else None
    budget = "720" if mode == "block_distill" else "768"
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode=mode, tokens=budget), teacher=teacher)

    assert pruner.recovery["steps"] == 8
    if mode != "block_distill":
        assert "Training for 8 steps, which read about 768 tokens (2.0 passes over the data), in about" in (
            capfd.readouterr().err
        )


@pytest.mark.parametrize("mode", ["full", "block_distill"])
def test_tokens_that_the_data_cannot_fill_are_refused(pruner, tokens, tmp_path, mode):
    teacher = tiny.make_model("llama_gqa_biases") if mode == "block_distill" else None
    before = pruner.model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=r"reads the data, which has 3\d\d tokens, .* times; more than 4 passes gain"):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode=mode, tokens="2000"), teacher=teacher)

    assert torch.equal(pruner.model.lm_head.weight, before) and pruner.recovery is None
    assert not (tmp_path / "training").exists()


def test_measuring_a_step_changes_nothing(tokens, tmp_path):
    models = []
    for length in ({"tokens": "192"}, {"max_steps": 2}):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(REQUEST)
        models.append(pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode="lora", **length)))

    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models)))


@pytest.fixture
def slow_steps(monkeypatch):
    """Steps that are measured to take 10 seconds, on a clock that makes them."""
    monkeypatch.setattr(run_length.Budget, "_seconds_per_step", lambda *_args: 10.0)


def test_a_time_pays_for_the_steps_that_fit_into_it(pruner, tokens, tmp_path, slow_steps, capfd):
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode="full", time="1m"))

    assert pruner.recovery["steps"] == 6
    assert "Training for 6 steps, which read about 576 tokens" in capfd.readouterr().err


def test_a_long_time_ends_after_four_passes_and_a_short_one_is_refused(pruner, tokens, tmp_path, slow_steps):
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode="full", time="2h"))
    assert pruner.recovery["steps"] == 16
    with pytest.raises(ValueError, match="A step takes about 10 seconds, more than time allows"):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode="full", time="5s"))


def test_a_training_ends_when_its_time_is_over(pruner, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(run_length.Budget, "_seconds_per_step", lambda *_args: 1e-9)
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(run_length.time, "monotonic", lambda: next(clock))
    limit = run_length.TimeLimit(50)

    class Control:
        should_training_stop = False

    limit.on_train_begin(None, None, Control)
    stopped = []
    for _ in range(4):
        limit.on_step_end(None, None, Control)
        stopped.append(Control.should_training_stop)
    assert stopped == [False, False, True, True]


def test_a_resumed_run_takes_as_many_steps_as_its_time_first_paid_for(pruner, tokens, tmp_path, monkeypatch):
    options = {"mode": "full", "time": "1m", "save_strategy": "steps", "save_steps": 2}
    monkeypatch.setattr(run_length.Budget, "_seconds_per_step", lambda *_args: 10.0)
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, **options))
    monkeypatch.setattr(run_length.Budget, "_seconds_per_step", lambda *_args: 30.0)
    again = FwdPruner(tiny.make_model("llama_gqa_biases"))
    again.prune(REQUEST)
    checkpoint = str(tmp_path / "training" / "checkpoint-2")
    again.recover({"input_ids": tokens}, arguments(tmp_path, **options, resume_from_checkpoint=checkpoint))

    assert json.loads((tmp_path / "training" / "checkpoint-6" / "trainer_state.json").read_text())["max_steps"] == 6
    assert all(torch.equal(*pair) for pair in zip(pruner.model.parameters(), again.model.parameters()))


def test_no_more_of_a_stream_is_read_than_the_tokens_need():
    read = []

    def endless():
        while True:
            read.append(1)
            yield [1, 2, 3]

    data = training_data(endless(), None, RecoveryOptions(max_length=8), Wanted(tokens=10))
    assert len(data) == 4 and len(read) < 8


@pytest.mark.parametrize(("seconds", "words"), [(3.2, "4 seconds"), (700, "12 minutes"), (9000, "2.5 hours")])
def test_estimates_are_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_step_that_is_longer_than_the_data_is_taken_once():
    assert steps_for_time(100, 1.0, available=10, per_step=96).steps == 1
