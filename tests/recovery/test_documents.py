"""Packed text whose documents do not attend to each other."""

import numpy as np
import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, Mixture, PruningConfig, RecoveryArguments
from optimum_fwdprune.recovery import RecoveryOptions, training_data
from optimum_fwdprune.recovery.documents import positions_and_labels


REQUEST = PruningConfig(method="magnitude", kinds=["mlp"], reconstruction="none", sparsity=0.3)
TEXTS = ["the quick brown fox", "the lazy dog", "a fox jumps over the dog", "the brown dog"] * 6


def arguments(tmp_path, **changes):
    values = {"output_dir": str(tmp_path / "training"), "max_length": 24, "per_device_train_batch_size": 2}
    values |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "separate_documents": True}
    return RecoveryArguments(**values | {"max_steps": 1, "logging_steps": 1, "lora_dropout": 0.0} | changes)


def test_positions_start_again_and_first_tokens_are_not_predicted():
    sequences = np.arange(10, 20).reshape(2, 5)
    positions, labels = positions_and_labels(sequences, [0, 3, 7])

    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert labels.tolist() == [[-100, 11, 12, -100, 14], [-100, 16, -100, 18, 19]]


@torch.no_grad()
def mean_over_documents(model, tokenizer, texts, count):
    """The loss of every document alone, up to as many tokens as the packed sequences have."""
    total, counted, left = 0.0, 0, count
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        # Sequences cut documents.
        while ids and left:
            room = (left - 1) % 24 + 1
            piece = torch.tensor([ids[: min(room, left)]])
            ids, left = ids[piece.shape[1] :], left - piece.shape[1]
            if piece.shape[1] > 1:
                logits = model(piece).logits[0, :-1].log_softmax(-1)
                total -= float(logits.gather(-1, piece[0, 1:, None]).sum())
                counted += piece.shape[1] - 1
    return total / counted


@pytest.mark.parametrize("name", ["llama_gqa_biases", "gemma2", "qwen3"])
def test_the_loss_is_that_of_every_document_alone(name, tokenizer, tmp_path):
    pruner = FwdPruner(tiny.make_model(name), tokenizer)
    pruner.prune(REQUEST)
    expected = mean_over_documents(pruner.model, tokenizer, TEXTS, 48)
    # The two sequences of the first step.
    args = arguments(tmp_path, mode="full", learning_rate=1e-9)
    pruner.recover(TEXTS, args)
    assert pruner.trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_teacher_reads_documents_apart_too(tokenizer, tmp_path):
    """A student that is its teacher is at no distance, whatever is packed."""
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.prune(REQUEST)
    pruner.save_pretrained(tmp_path / "pruned")
    args = arguments(tmp_path, mode="distill", learning_rate=1e-9)
    pruner.recover(TEXTS, args, teacher=str(tmp_path / "pruned"))
    assert pruner.trainer.state.log_history[0]["divergence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["bloom", "opt_pre_norm"])
def test_families_that_cannot_are_refused_before_training(name, tokenizer, tmp_path):
    pruner = FwdPruner(tiny.make_model(name), tokenizer)
    pruner.prune(REQUEST)
    with pytest.raises(ValueError, match="separate_documents=True needs attention that ends where positions start"):
        pruner.recover(TEXTS, arguments(tmp_path))
    assert not (tmp_path / "training").exists()


def test_rows_that_are_not_packed_are_refused():
    with pytest.raises(ValueError, match="separate_documents=True is for text"):
        training_data([[1, 2, 3, 4]], None, RecoveryOptions(max_length=8, separate_documents=True))


def test_documents_of_a_mixture_stay_apart(tokenizer):
    options = RecoveryOptions(max_length=8, separate_documents=True)
    data = training_data(Mixture([TEXTS, TEXTS[::-1]], [1, 1]), tokenizer, options)
    assert all(len(row) == 8 for row in data["position_ids"])
    assert any(0 in row[1:] for row in data["position_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "block_distill"}, "separate_documents=True cannot be combined with mode='block_distill'"),
        ({"mode": "distill", "teacher_cache": "kept"}, "cannot be combined with teacher_cache='kept'"),
    ],
)
def test_what_does_not_know_documents_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)
