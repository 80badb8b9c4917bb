"""Choosing the best state of a training by held-out data: a share of the data, the best weights, early stopping."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.recovery.amounts import held_out_evenly


REQUEST = PruningConfig(method="magnitude", kinds=["attention", "mlp"], reconstruction="none", sparsity=0.4)


def arguments(tmp_path, **changes):
    values = {"output_dir": str(tmp_path / "training"), "max_length": 24, "per_device_train_batch_size": 4}
    return RecoveryArguments(**values | {"use_cpu": True, "disable_tqdm": True} | changes)


@pytest.fixture
def pruner():
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(REQUEST)
    return pruner


# So large that the loss on other text soon rises.
OVERFITTING = {"mode": "full", "learning_rate": 0.05, "max_steps": 30, "held_out": 0.25, "eval_steps": 1, "seed": 3}


def test_the_best_weights_are_kept_and_the_training_ends_early(pruner, tokens, tmp_path):
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, **OVERFITTING, early_stopping=2))
    losses = [entry["eval_loss"] for entry in pruner.trainer.state.log_history if "eval_loss" in entry]

    assert pruner.recovery["steps"] < 30 and min(losses) < losses[-1]
    held_out = tokens[3::4]
    with torch.no_grad():
        found = float(pruner.model(held_out, labels=held_out).loss)
    assert found == pytest.approx(min(losses), rel=1e-4)
    assert pruner.recovery["best held-out loss"] == pytest.approx(found, abs=1e-4)
    assert pruner.recovery["best step"] == losses.index(min(losses)) + 1


def test_the_last_weights_are_kept_where_the_user_says_so(pruner, tokens, tmp_path):
    options = {**OVERFITTING, "max_steps": 8, "load_best_model_at_end": False, "save_strategy": "no"}
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, **options))
    losses = [entry["eval_loss"] for entry in pruner.trainer.state.log_history if "eval_loss" in entry]

    with torch.no_grad():
        found = float(pruner.model(tokens[3::4], labels=tokens[3::4]).loss)
    assert found == pytest.approx(losses[-1], rel=1e-4) and min(losses) < losses[-1]


@pytest.mark.parametrize("cached", [False, True])
def test_held_out_sequences_are_compared_with_the_teacher_too(cached, pruner, tokens, tmp_path):
    options = {"teacher_cache": str(tmp_path / "kept")} if cached else {}
    args = arguments(tmp_path, mode="distill", max_steps=2, eval_steps=1, held_out=0.25, **options)
    pruner.recover({"input_ids": tokens}, args, teacher=tiny.make_model("llama_gqa_biases"))

    assert sum("eval_loss" in entry for entry in pruner.trainer.state.log_history) == 2
    # Nine are read of which eight are trained on, and two are held out.
    assert pruner.recovery["sequences"] == 9


def test_the_record_has_what_was_trained_on_how_much(pruner, tokens, tmp_path):
    args = arguments(tmp_path, mode="full", save_strategy="no", num_train_epochs=2)
    pruner.recover({"input_ids": tokens}, args)

    expected = {"sequences": 16, "tokens": 384, "passes over the data": 2.0}
    assert {name: pruner.recovery[name] for name in expected} == expected
    assert pruner.recovery["trained parameters"] == sum(value.numel() for value in pruner.model.parameters())
    pruner.save_pretrained(tmp_path / "saved")
    assert "- tokens: 384" in (tmp_path / "saved" / "README.md").read_text()


def test_adapters_are_the_trained_parameters(pruner, tokens, tmp_path):
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, save_strategy="no", max_steps=1, lora_r=2))

    assert 0 < pruner.recovery["trained parameters"] < 10**4


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [(8, 0.25, [3, 7]), (8, None, []), (3, 0.05, [2]), (4, 0.5, [1, 3]), (40, 0.05, [19, 39])],
)
def test_sequences_are_held_out_evenly(count, share, held_out):
    training, found = held_out_evenly(count, share)

    assert found == held_out and sorted([*training, *found]) == list(range(count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0.0}, "held_out must be above 0 and at most 0.5; got 0.0"),
        ({"held_out": 0.9}, "held_out must be above 0 and at most 0.5"),
        ({"early_stopping": 0}, "early_stopping must be at least 1"),
        ({"early_stopping": 2, "mode": "block_distill"}, "early_stopping=2 cannot be combined"),
    ],
)
def test_values_out_of_range_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"early_stopping": 2}, {}, "eval_strategy='steps' needs an eval_dataset, or held_out=0.05"),
        ({"held_out": 0.1}, {"eval_dataset": []}, "held_out=0.1 cannot be combined with an eval_dataset"),
    ],
)
def test_evaluations_without_data_are_refused(changes, options, message, pruner, tmp_path):
    with pytest.raises(ValueError, match=message):
        pruner.recover(None, arguments(tmp_path, **changes), **options)
