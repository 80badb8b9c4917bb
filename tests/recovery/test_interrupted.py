"""Recovery leaves everything but weights as it was, also where it fails in the middle or is interrupted."""

import copy
import json
import os
import random

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.recovery.trainer import RecoveryTrainer


REQUEST = PruningConfig(method="magnitude", kinds=["attention", "mlp"], reconstruction="none", sparsity=0.4)


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path / "training"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return RecoveryArguments(**values | changes)


@pytest.fixture
def pruner(tokenizer):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.prune(REQUEST)
    return pruner


def state_of(model):
    """Everything of a model but weights, and of the process, that training could leave changed."""
    state = {"config": dict(vars(model.config)), "generation": dict(vars(model.generation_config))}
    for name, module in model.named_modules():
        # Weights are what is trained, and the record says so.
        kept = ("_parameters", "_buffers", "pruning_record")
        own = {key: value for key, value in vars(module).items() if key not in kept}
        state[name] = {
            key: dict(value) if isinstance(value, dict) else value if isinstance(value, (bool, int)) else id(value)
            for key, value in own.items()
        }
    state["parameters"] = {
        name: (parameter.requires_grad, parameter.dtype, parameter.grad is None)
        for name, parameter in model.named_parameters()
    }
    state["random"] = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    state["environment"] = dict(os.environ)
    return state


def seeded():
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


def interrupted_by_callback(monkeypatch):
    return {"callbacks": [Interrupt]}


def interrupted_by_data(monkeypatch):
    original = RecoveryTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "training_step", step)
    return {}


def interrupted_while_merging(monkeypatch):
    from peft.tuners.lora import Linear

    original, merged = Linear.merge, []

    def merge(self, *args, **kwargs):
        merged.append(self)
        if len(merged) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "merge", merge)
    return {}


def interrupted_while_preparing(monkeypatch):
    def init(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(RecoveryTrainer, "__init__", init)
    return {}


WAYS = [interrupted_by_callback, interrupted_by_data, interrupted_while_merging, interrupted_while_preparing]


@pytest.mark.parametrize(
    ("mode", "way"),
    [
        (mode, way)
        for mode in ("lora", "full", "distill")
        for way in WAYS
        # Where all weights are trained nothing is merged.
        if (mode, way) != ("full", interrupted_while_merging)
    ],
)
def test_a_run_that_fails_leaves_a_plain_model_and_nothing_else_changed(
    pruner, tokens, tmp_path, monkeypatch, mode, way
):
    model, options = pruner.model, way(monkeypatch)
    if mode == "distill":
        options["teacher"] = tiny.make_model("llama_gqa_biases")
    weights = copy.deepcopy(model.state_dict())
    models = [model, *([options["teacher"]] if mode == "distill" else [])]
    seeded()
    before = [state_of(each) for each in models]
    seeded()
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        args = arguments(tmp_path, mode=mode, activation_checkpointing=True, bf16=True)
        pruner.recover({"input_ids": tokens}, args, **options)
    after = [state_of(each) for each in models]

    assert pruner.model is model and after == before
    if mode != "full" and way is not interrupted_while_merging:
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    # Adding and subtracting a product rounds.
    torch.testing.assert_close(
        model.state_dict(), weights, atol=1e-6 if mode != "full" else 0.1, rtol=1e-5 if mode != "full" else 0.1
    )
    assert not (tmp_path / "training").exists()
    pruner.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("mode", ["lora", "full", "distill"])
def test_a_run_that_succeeds_changes_weights_alone(pruner, tokens, tmp_path, mode):
    model, teacher = pruner.model, tiny.make_model("llama_gqa_biases").train()
    seeded()
    before = state_of(model), state_of(teacher)
    seeded()
    args = arguments(tmp_path, mode=mode, activation_checkpointing=True, bf16=True)
    pruner.recover({"input_ids": tokens}, args, teacher=teacher if mode == "distill" else None)

    assert pruner.model is model and (state_of(model), state_of(teacher)) == before
    assert not (tmp_path / "training").exists()


def test_weights_that_were_trained_for_a_while_are_recorded_so(pruner, tokens, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode="full"), callbacks=[Interrupt()])
    pruner.save_pretrained(tmp_path / "saved")

    assert "- interrupted by: KeyboardInterrupt" in (tmp_path / "saved" / "README.md").read_text()
    assert FwdPruner.from_pretrained(tmp_path / "saved").recovery["steps"] == 2


def test_adapters_that_were_taken_out_leave_no_record(pruner, tokens, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path), callbacks=[Interrupt()])

    assert pruner.recovery is None


@pytest.mark.parametrize(("mode", "dtype"), [("lora", torch.float32), ("full", torch.bfloat16)])
def test_early_stopping_ends_with_the_best_weights(pruner, tokens, tmp_path, mode, dtype):
    pruner.model.to(dtype)
    args = arguments(
        tmp_path,
        mode=mode,
        # So large that the loss on other text soon rises.
        learning_rate=0.05,
        max_steps=30,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        lora_dropout=0.0,
        seed=3,
    )
    held_out = {"input_ids": torch.randint(0, tiny.VOCAB, (4, 24), generator=torch.Generator().manual_seed(9))}
    pruner.recover({"input_ids": tokens}, args, eval_dataset=held_out, callbacks=[EarlyStoppingCallback(2)])
    state = pruner.trainer.state
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]

    assert state.global_step < 30 and len(losses) == state.global_step
    assert min(losses) < losses[-1]
    ids = held_out["input_ids"]
    with torch.no_grad():
        found = float(pruner.model(ids, labels=ids).loss)
    assert found == pytest.approx(min(losses), rel=1e-3 if dtype == torch.float32 else 2e-2)


def test_what_is_no_callback_is_named_before_training(pruner, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"callbacks must be objects or subclasses of .*TrainerCallback.*got a str"):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path), callbacks=["early stopping"])
    with pytest.raises(ValueError, match="eval_strategy='steps' needs an eval_dataset"):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path, eval_strategy="steps"))


class TestGenerationConfig:
    VALUES = [{"temperature": 0.9, "top_p": 0.6}, {"top_k": 7}, {"num_beams": 1, "length_penalty": 0.5}]

    @pytest.mark.parametrize(("values", "mode"), [(VALUES[0], "lora"), (VALUES[1], "full"), (VALUES[2], "full")])
    def test_values_that_transformers_calls_invalid_are_saved_as_they_are(
        self, tokenizer, tokens, tmp_path, values, mode
    ):
        tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        file = tmp_path / "dense" / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        pruner = FwdPruner.from_pretrained(tmp_path / "dense")
        pruner.prune(REQUEST)
        pruner.model.generation_config.max_new_tokens = 33
        before = dict(vars(pruner.model.generation_config))
        args = arguments(tmp_path, mode=mode, save_strategy="steps", save_steps=2)
        pruner.recover({"input_ids": tokens}, args)
        pruner.save_pretrained(tmp_path / "out")

        assert vars(pruner.model.generation_config) == before
        folders = [tmp_path / "out"]
        if mode == "full":
            folders.append(tmp_path / "training" / "checkpoint-4")
        for folder in folders:
            found = json.loads((folder / "generation_config.json").read_text())
            expected = {**values, "max_new_tokens": 33}
            assert {name: found.get(name) for name in expected if expected[name] != 1} == {
                name: value for name, value in expected.items() if value != 1
            }
            assert "do_sample" not in found
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("low_memory", [False, True])
    def test_pruning_saves_them_too(self, tmp_path, low_memory):
        tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=low_memory)
        pruner.model.generation_config.temperature = 0.9
        pruner.prune(REQUEST)
        pruner.save_pretrained(tmp_path / "out")

        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.9

    def test_one_that_would_not_load_again_is_refused_before_training(self, pruner, tokens, tmp_path):
        pruner.model.generation_config.num_return_sequences = 3
        with pytest.raises(ValueError, match=r"could not be loaded again.*num_return_sequences.*Correct"):
            pruner.recover({"input_ids": tokens}, arguments(tmp_path))

    def test_low_memory_refuses_it_before_scoring(self, tmp_path, monkeypatch):
        tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
        pruner.model.generation_config.num_return_sequences = 3
        monkeypatch.setattr("optimum_fwdprune.planning.run.score_units", lambda *_: pytest.fail("scored"))
        with pytest.raises(ValueError, match=r"could not be loaded again.*num_return_sequences.*Correct"):
            pruner.prune(REQUEST)


def test_a_tokenizer_that_cannot_be_saved_is_named_before_training(pruner, tokens, tmp_path, monkeypatch):
    def failing(*_args, **_kwargs):
        raise NotImplementedError("no vocabulary file")

    monkeypatch.setattr(type(pruner.tokenizer), "save_pretrained", failing)
    with pytest.raises(ValueError, match=r"tokenizer, a .*, cannot be saved \(NotImplementedError: no vocabulary"):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path))
    assert pruner.trainer is None
