"""Pruning in rounds with a training after every round: one request, which an interrupted run resumes bit for bit."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_fwdprune import FwdPruner, RecoveryArguments, RecoveryRequest
from optimum_fwdprune.planning import run as run_module
from optimum_fwdprune.recovery import rounds as rounds_module


TEXT = ["the quick brown fox jumps over the lazy dog"] * 60
MODES = {
    "lora": {"mode": "lora"},
    "blocks, then distill": {"mode": "block_distill", "then": "distill", "adapters": False},
}


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 3,
        "max_length": 16,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return RecoveryArguments(**values | changes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("dense")
    tiny.make_model("llama_gqa_biases").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(dense, tokens, args, callbacks=None, **fields):
    pruner = FwdPruner.from_pretrained(dense)
    request = RecoveryRequest(TEXT, args, callbacks=callbacks)
    values = {"method": "wanda_sp", "kinds": ["mlp"], "sparsity": 0.4, "rounds": 2, "reconstruction": "none"}
    pruner.prune_and_recover(request, dataset=tokens, **values | fields)
    return pruner


def assert_same(found, expected):
    assert found.plan.kept == expected.plan.kept
    assert found.recovery == expected.recovery
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


def test_one_round_is_a_pruning_and_a_recovery(dense, tokens, tmp_path):
    found = run(dense, tokens, arguments(tmp_path / "a", mode="full"), rounds=1)
    expected = FwdPruner.from_pretrained(dense)
    expected.prune(found.config, tokens)
    expected.recover(TEXT, arguments(tmp_path / "b", mode="full"))

    assert_same(found, expected)
    assert found.trainer.state.global_step == 3


def test_a_round_scores_what_the_training_before_left(dense, tokens, tmp_path, monkeypatch):
    trained, scored = [], []
    train, score_units = rounds_module.RoundRecovery.run, run_module.score_units

    def watched_training(self, *inputs):
        model = train(self, *inputs)
        trained.append({name: value.clone() for name, value in model.state_dict().items()})
        return model

    def watched_scoring(subject, *inputs):
        scored.append({name: value.clone() for name, value in subject.model.state_dict().items()})
        return score_units(subject, *inputs)

    monkeypatch.setattr(rounds_module.RoundRecovery, "run", watched_training)
    monkeypatch.setattr(run_module, "score_units", watched_scoring)
    pruner = run(dense, tokens, arguments(tmp_path / "training", mode="full"))
    pruner.save_pretrained(tmp_path / "out")

    assert all(torch.equal(value, trained[0][name]) for name, value in scored[1].items())
    assert {path.name for path in (tmp_path / "training").iterdir()} == {"round-1", "round-2"}
    assert pruner.report.sparsity == pytest.approx(0.4, abs=0.02) and pruner.report.seconds["recover"] > 0
    assert [stage["round"] for stage in (*pruner.recovery["earlier"], pruner.recovery)] == [1, 2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It was trained after round 1 in all weights for 3 steps on `data in memory`; after round 2 in all" in card
    assert "the data of its training, a teacher or callbacks were passed to `prune_and_recover`" in card
    assert "passed to `prune(dataset=...)` in Python" in card and "After every round of the pruning, the" in card
    loaded = FwdPruner.from_pretrained(tmp_path / "out")
    assert loaded.recovery == pruner.recovery and loaded.plan.kept == pruner.plan.kept
    # The plan of both rounds is one for the dense model.
    replayed = FwdPruner.from_pretrained(dense).prune(plan=loaded.plan)
    assert {name: value.shape for name, value in replayed.state_dict().items()} == {
        name: value.shape for name, value in pruner.model.state_dict().items()
    }


class Interrupt(TrainerCallback):
    """Interrupts the step of a number, counted over all rounds."""

    def __init__(self, number):
        self.left = number

    def on_step_begin(self, *_arguments, **_options):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_interrupted_ends_with_the_same_weights(dense, tokens, tmp_path, mode):
    options = MODES[mode] | {"max_steps": 2}
    expected = run(dense, tokens, arguments(tmp_path / "training", **options))
    states = {"resume": str(tmp_path / "states"), "resume_seconds": 0.0}
    args = arguments(tmp_path / "unused", **options)
    # In the last step of the first round, and of the second one.
    for step in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(dense, tokens, args, [Interrupt(step)], **states)
    counter = Interrupt(100)
    assert_same(run(dense, tokens, args, [counter], **states), expected)

    # Only the last step was left, and the Trainer's folder is among the states.
    assert counter.left == 99 and not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match=r"belongs to another run.*learning_rate"):
        run(dense, tokens, arguments(tmp_path, **options | {"learning_rate": 1e-2}), **states)


def test_an_interrupted_training_is_in_the_record(dense, tokens, tmp_path):
    pruner = FwdPruner.from_pretrained(dense)
    request = RecoveryRequest(TEXT, arguments(tmp_path, mode="full"), callbacks=[Interrupt(6)])
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_and_recover(request, dataset=tokens, rounds=2, sparsity=0.4, reconstruction="none")
    pruner.save_pretrained(tmp_path / "saved")

    loaded = FwdPruner.from_pretrained(tmp_path / "saved")
    assert loaded.recovery["interrupted by"] == "KeyboardInterrupt" and loaded.recovery["steps"] == 2
    assert [stage["round"] for stage in (*loaded.recovery["earlier"], loaded.recovery)] == [1, 2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(tokens).logits.isfinite().all()


def shallow():
    return tiny.make_model("llama_mqa", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda folder: TEXT, "recovery must be a RecoveryRequest"),
        (lambda folder: RecoveryRequest(TEXT, {"max_steps": 1}), "args must be RecoveryArguments"),
        (lambda folder: RecoveryRequest("none.txt", arguments(folder)), "none.txt"),
        (lambda folder: RecoveryRequest(["the fox"], arguments(folder)), "too short"),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder, max_steps=-1, tokens="1M")), "lower tokens to"),
        (
            lambda folder: RecoveryRequest(["none.txt", "self"], arguments(folder, mode="distill")),
            "none.txt",
        ),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder, lora_targets=["nope"])), "ends in 'nope'"),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder, merge_adapters=False)), "Leave it on"),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder, resume_from_checkpoint="x")), "resume=FOLDER"),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder, eval_strategy="steps")), "needs an eval_dataset"),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder), callbacks=["x"]), "callbacks must be"),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder, mode="distill"), teacher="nowhere"), "nowhere"),
        (lambda folder: RecoveryRequest(TEXT, arguments(folder), teacher="nowhere"), "A teacher is used with"),
        (
            lambda folder: RecoveryRequest(
                TEXT,
                arguments(folder, mode="block_distill"),
                teacher=tiny.make_model("llama_mqa", num_hidden_layers=2),
            ),
            "The teacher has 2 layers",
        ),
        (lambda folder: RecoveryRequest("self", arguments(folder)), "text that the teacher writes"),
    ],
)
def test_what_cannot_be_done_is_refused_before_scoring(dense, tokens, tmp_path, monkeypatch, request_of, message):
    monkeypatch.setattr(run_module, "score_units", lambda *_: pytest.fail("scored"))
    monkeypatch.chdir(tmp_path)
    pruner = FwdPruner.from_pretrained(dense)
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        pruner.prune_and_recover(request_of(tmp_path / "training"), dataset=tokens, rounds=2)
    assert pruner.plan is None and pruner.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())


def test_models_on_disk_and_teachers_without_a_name_are_refused(dense, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"low_memory=True leaves the layers .* on disk"):
        FwdPruner.from_pretrained(dense, low_memory=True).prune_and_recover(RecoveryRequest(TEXT), dataset=tokens)
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    request = RecoveryRequest({"input_ids": tokens}, arguments(tmp_path, mode="distill"))
    with pytest.raises(ValueError, match=r"needs the dense model; name it with teacher"):
        pruner.prune_and_recover(request, dataset=tokens)
    request = RecoveryRequest({"input_ids": tokens}, arguments(tmp_path, mode="distill"), teacher=pruner.model)
    with pytest.raises(ValueError, match=r"teacher shares weights with the model"):
        pruner.prune_and_recover(request, dataset=tokens)
