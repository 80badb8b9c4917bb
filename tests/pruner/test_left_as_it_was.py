"""What a run leaves behind: the model, its modules and the process are as they were, whether it succeeds or fails."""

import copy
import gc
import os
import random
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_fwdprune import (
    FwdPruner,
    PruningConfig,
    RecoveryArguments,
)
from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.cutting import cut as cutting
from optimum_fwdprune.cutting import probe, surgery
from optimum_fwdprune.evaluation import benchmark, perplexity, text_loss
from optimum_fwdprune.files import folder_moved_into_place, write_text_atomically
from optimum_fwdprune.planning import calibration_text, checks, run
from optimum_fwdprune.reconstruction import reconstruct
from optimum_fwdprune.record import outcome


# Frequencies that depend on the length of the text.
ROPES = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 16,
    },
}
BOTH_KINDS = {"kinds": ["attention", "mlp"], "sparsity": 0.3}


def with_rope(rope):
    """A model that knows 16 positions."""
    positions = 16 if rope == "dynamic" else 128
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    return tiny.make_model("llama_gqa_biases", max_position_embeddings=positions, rope_parameters=parameters)


def state_of(model):
    """Modes, buffers and attributes of all modules."""
    return {
        name: (
            module.training,
            {key: buffer.clone() for key, buffer in module.named_buffers(recurse=False)},
            {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, bool))},
            [len(value) for key, value in vars(module).items() if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, (training, buffers, *others) in expected.items():
        assert actual[name][0] == training and list(actual[name][2:]) == others, name
        assert actual[name][1].keys() == buffers.keys()
        assert all(torch.equal(actual[name][1][key], buffer) for key, buffer in buffers.items()), name


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("read_before", [0, 40])
@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_a_model_calibrated_beyond_its_positions_is_the_one_that_is_saved(
    rope, read_before, low_memory, tokens, tmp_path
):
    dense = with_rope(rope)
    if low_memory:
        dense.save_pretrained(tmp_path / "dense")
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=True)
    else:
        pruner = FwdPruner(dense)
    if read_before:
        pruner.model(tokens[:2].repeat(1, 2)[:, :read_before])
    pruned = pruner.prune(PruningConfig(reconstruction="least_squares", **BOTH_KINDS), tokens)
    pruner.save_pretrained(tmp_path / "pruned")

    for length in (12, 24, 20):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        assert torch.equal(copy.deepcopy(pruned)(tokens[:2, :length]).logits, loaded(tokens[:2, :length]).logits)


@pytest.mark.parametrize("method", ["wanda_sp", "mini_llm", "policy_gradient"])
@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_scoring_leaves_what_a_model_has_read_as_it_was(rope, method, tokens):
    dense = with_rope(rope)
    dense(tokens[:2, :20])
    # Neither all of its modules train nor none.
    dense.model.layers[1].train()
    before, expected = state_of(dense), copy.deepcopy(dense)(tokens[:2, :18]).logits
    pruner = FwdPruner(dense)
    pruner.score(PruningConfig(method=method, **tiny.SHORT.get(method, {})), tokens)
    pruner.prune(PruningConfig(method=method, **tiny.SHORT.get(method, {}), **BOTH_KINDS), tokens, inplace=False)

    assert_same_state(state_of(dense), before)
    assert torch.equal(dense(tokens[:2, :18]).logits, expected)


# Stages of a run, each by the function that it calls, and how many calls succeed before one fails.
BEFORE_SURGERY = [
    (checks, "check_counterpart", 0),
    (calibration_text, "load_calibration", 0),
    (run, "score_units", 0),
    (run, "make_plan", 0),
    (cutting, "reconstruct_by_layer", 0),
    (reconstruct, "Reconstruction", 2),
    (probe, "rounded", 0),
    (probe, "replaced_projections", 3),
    (probe, "share_of_scale", 0),
    (surgery, "empty_pruned_model", 0),
    (surgery, "slice_tensor", 0),
]
IN_SURGERY = [(surgery, "slice_tensor", 20), (surgery, "set_parameter", 70), (surgery, "forget_lengths", 0)]
AFTER_SURGERY = [(cutting, "logits", 0), (cutting, "relative_difference", 0), (outcome, "Outcome", 0)]
ERRORS = [torch.OutOfMemoryError, KeyboardInterrupt]


def fail_in(monkeypatch, stage, error):
    module, name, successes = stage
    original, calls = getattr(module, name), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > successes:
            raise error("simulated")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, fails)


def process_state():
    """What a run could change for the whole process."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", BEFORE_SURGERY, ids=lambda stage: stage[1])
def test_an_error_before_surgery_leaves_the_model_and_the_process_as_they_were(stage, error, tokens, monkeypatch):
    dense = tiny.make_model("llama_gqa_biases")
    dense.model.layers[1].train()
    dense.model.embed_tokens.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in dense.parameters()]
    expected, state, process = copy.deepcopy(dense).eval()(tokens).logits, state_of(dense), process_state()
    fwd_pruner = FwdPruner(dense)
    with monkeypatch.context() as patch, pytest.raises(error):
        fail_in(patch, stage, error)
        fwd_pruner.prune(PruningConfig(reconstruction="least_squares", **BOTH_KINDS), tokens)

    assert fwd_pruner.model is dense and fwd_pruner.plan is None
    assert process_state() == process
    assert_same_state(state_of(dense), state)
    assert [parameter.requires_grad for parameter in dense.parameters()] == flags
    assert torch.equal(copy.deepcopy(dense).eval()(tokens).logits, expected)
    fwd_pruner.prune(PruningConfig(reconstruction="least_squares", **BOTH_KINDS), tokens)
    assert fwd_pruner.report.masked_difference < 1e-4


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", IN_SURGERY, ids=lambda stage: stage[1])
def test_a_model_that_was_consumed_says_so(stage, error, tokens, tmp_path, monkeypatch):
    fwd_pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    fwd_pruner.model.config._name_or_path = "some/model"
    request = PruningConfig(reconstruction="none", **BOTH_KINDS)
    with monkeypatch.context() as patch, pytest.raises(error) as caught:
        fail_in(patch, stage, error)
        fwd_pruner.prune(request, tokens)

    assert "the model was consumed: load it again" in caught.value.__notes__[0]
    for call in (
        lambda: fwd_pruner.prune(request, tokens),
        lambda: fwd_pruner.score(request, tokens),
        lambda: fwd_pruner.recover(["text"]),
        lambda: fwd_pruner.save_pretrained(tmp_path / "out"),
        lambda: FwdPruner(fwd_pruner.model),
    ):
        with pytest.raises(ValueError, match=r"was consumed by prune\(\).*\.from_pretrained\('some/model'\)"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("stage", AFTER_SURGERY, ids=lambda stage: stage[1])
@torch.no_grad()
def test_a_pruned_model_that_was_finished_is_kept(stage, error, tokens, tmp_path, monkeypatch):
    request = PruningConfig(reconstruction="least_squares", **BOTH_KINDS)
    expected = FwdPruner(tiny.make_model("llama_gqa_biases")).prune(request, tokens)
    fwd_pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    with monkeypatch.context() as patch, pytest.raises(error) as caught:
        fail_in(patch, stage, error)
        fwd_pruner.prune(request, tokens)

    assert "pruner.model is the pruned model" in caught.value.__notes__[0]
    assert torch.equal(fwd_pruner.model(tokens).logits, expected(tokens).logits)
    fwd_pruner.save_pretrained(tmp_path / "out")
    loaded = FwdPruner.from_pretrained(tmp_path / "out")
    assert loaded.plan.kept == fwd_pruner.plan.kept
    assert torch.equal(loaded.model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("stage", IN_SURGERY + AFTER_SURGERY, ids=lambda stage: stage[1])
@torch.no_grad()
def test_a_dense_model_that_is_not_consumed_stays_whole_whatever_fails(stage, tokens, monkeypatch):
    dense = tiny.make_model("llama_gqa_biases")
    expected = dense(tokens).logits
    fwd_pruner = FwdPruner(dense)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_in(patch, stage, KeyboardInterrupt)
        fwd_pruner.prune(PruningConfig(reconstruction="none", **BOTH_KINDS), tokens, inplace=False)

    assert torch.equal(dense(tokens).logits, expected)
    if stage[1] != "Outcome":
        assert fwd_pruner.model is dense and fwd_pruner.plan is None


@pytest.mark.parametrize(
    "stage", [(cutting, "reconstruct_by_layer", 1), (cutting, "logits", 1), (run, "score_units", 1)]
)
@torch.no_grad()
def test_a_later_round_that_fails_leaves_what_is_finished(stage, tokens, monkeypatch):
    request = PruningConfig(reconstruction="none", rounds=2, **BOTH_KINDS)
    fwd_pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        fail_in(patch, stage, KeyboardInterrupt)
        fwd_pruner.prune(request, tokens)

    assert "lists the units that it keeps" in caught.value.__notes__[0]
    # Of the dense model: the plan does at once what was done so far.
    replayed = FwdPruner(tiny.make_model("llama_gqa_biases")).prune(plan=fwd_pruner.plan)
    assert torch.equal(replayed(tokens).logits, fwd_pruner.model(tokens).logits)


def test_a_consumed_model_is_named_where_it_is_used_again(tokens, tmp_path):
    dense = tiny.make_model("llama_gqa_biases")
    fwd_pruner = FwdPruner(dense)
    fwd_pruner.prune(PruningConfig(reconstruction="none", **BOTH_KINDS), tokens)
    distill = RecoveryArguments(str(tmp_path / "training"), mode="distill", use_cpu=True)
    for call in (
        lambda: FwdPruner(dense),
        lambda: fwd_pruner.recover(None, distill, teacher=dense),
        lambda: text_loss(dense, tokens[0]),
        lambda: perplexity(dense, tokens),
        lambda: benchmark([dense]),
        lambda: dense(tokens),
        lambda: copy.deepcopy(dense)(tokens),
        lambda: dense.generate(tokens),
        lambda: dense.save_pretrained(tmp_path / "out"),
        lambda: dense.push_to_hub("someone/dense"),
    ):
        with pytest.raises(ValueError, match="was consumed by prune"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_consumed_model_is_freed_with_its_last_reference(tokens):
    dense = tiny.make_model("llama_gqa_biases")
    fwd_pruner = FwdPruner(dense)
    fwd_pruner.prune(PruningConfig(reconstruction="none", **BOTH_KINDS), tokens)
    held = weakref.ref(dense)
    gc.collect()
    gc.disable()
    try:
        del dense
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("method", tiny.methods_of_dense_models())
def test_a_run_leaves_the_process_as_it_was(method, tokenizer, tmp_path):
    own = {**tiny.SHORT.get(method, {}), "calibration": "self", "n_samples": 4, "seq_len": 12}
    random.seed(1)
    before = process_state()
    fwd_pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    made = process_state()
    fwd_pruner.prune(PruningConfig(method, **own, kinds=tiny.kinds_scored_by(method), sparsity=0.3))
    fwd_pruner.save_pretrained(tmp_path / "out")

    # Only making the random model drew numbers.
    assert {**made, "torch": None} == {**before, "torch": None}
    assert process_state() == made


def test_latencies_are_timed_without_drawing_numbers(tokens, monkeypatch):
    monkeypatch.setattr("optimum_fwdprune.planning.timing.median_seconds", tiny.counted_seconds)
    fwd_pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    before = process_state()
    speed = {"target_speedup": 1.1, "latency_tokens": 16, "kinds": ["attention", "mlp"]}
    fwd_pruner.prune(PruningConfig(reconstruction="none", scope="global", **speed), tokens)

    assert process_state() == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_of_the_umask_which_no_moment_changes(mask, tmp_path, monkeypatch):
    before = os.umask(mask)
    calls = []
    try:
        monkeypatch.setattr(os, "umask", lambda value: calls.append(value))
        write_text_atomically(tmp_path / "text.json", "{}")
        with folder_moved_into_place(tmp_path / "folder") as folder:
            private = folder / "private"
            private.touch(0o600)
            (folder / "inner").mkdir(0o700)
    finally:
        monkeypatch.undo()
        os.umask(before)

    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    file, inner = 0o666 & ~mask, 0o777 & ~mask
    expected = {"text.json": file, "folder": inner, "folder/private": file, "folder/inner": inner}
    assert modes == {Path(name): mode for name, mode in expected.items()}
    assert not calls


def test_threads_write_at_the_same_time(tmp_path):
    def write(number):
        for _ in range(20):
            write_text_atomically(tmp_path / "shared.json", str(number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]


def plan_of(dense, tokens):
    fwd_pruner = FwdPruner(copy.deepcopy(dense))
    fwd_pruner.prune(PruningConfig(method="magnitude", reconstruction="none", **BOTH_KINDS), tokens)
    return fwd_pruner.plan


def narrower(model):
    """Its last layer's output projection, by hand."""
    layer = model.model.layers[-1].mlp
    for name, shape in (("gate_proj", (48, 40)), ("up_proj", (48, 40)), ("down_proj", (40, 48))):
        setattr(layer, name, torch.nn.Linear(*shape, bias=layer.down_proj.bias is not None))


CONTRADICTIONS = {
    "num_hidden_layers": lambda model: setattr(model.model, "layers", model.model.layers[:2]),
    "num_attention_heads": lambda model: setattr(model.config, "num_attention_heads", 3),
    "num_key_value_heads": lambda model: setattr(model.config, "num_key_value_heads", 1),
    "intermediate_size": lambda model: setattr(model.config, "intermediate_size", 100),
    "intermediate_size is 64 and layer 2": narrower,
    "head_dim": lambda model: setattr(model.config, "head_dim", 16),
    "vocab_size": lambda model: setattr(model.config, "vocab_size", 400),
    "vocab_size=300": lambda model: setattr(model.model, "embed_tokens", torch.nn.Embedding(400, 48)),
    "hidden_size": lambda model: setattr(model.config, "hidden_size", 96),
    "rope_parameters": lambda model: model.config.rope_parameters.update(rope_theta=3.0),
    "describes 12 parameters that the model lacks": lambda model: setattr(model.config, "attention_bias", True),
    "a module was replaced": lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.Tanh()),
    "an entry of its config": lambda model: setattr(model.model.norm, "variance_epsilon", 1.0),
}


@pytest.mark.parametrize("entry", ["prune", "score", "replay"])
@pytest.mark.parametrize("words", CONTRADICTIONS)
def test_a_model_that_contradicts_its_config_is_refused_while_whole(words, entry, tokens, monkeypatch):
    dense = tiny.make_model("llama_mha_tied" if "kv" in words else "llama_gqa_biases", attention_bias=False)
    plan = plan_of(dense, tokens) if entry == "replay" else None
    CONTRADICTIONS[words](dense)
    monkeypatch.setattr(run, "score_units", None)
    fwd_pruner = FwdPruner(dense)
    if entry == "replay" and words == "intermediate_size is 64 and layer 2":
        words = "it has 64 units in the mlp of layer 2, and the model has 40"
    with pytest.raises(ValueError, match=words):
        if entry == "score":
            fwd_pruner.score(PruningConfig(**BOTH_KINDS), tokens)
        else:
            fwd_pruner.prune(PruningConfig(**BOTH_KINDS) if plan is None else None, tokens, plan=plan)

    assert fwd_pruner.model is dense and all(parameter.numel() for parameter in dense.parameters())


@pytest.mark.parametrize("kind", ["layers", "heads", "widths", "vocabulary"])
def test_every_family_is_checked_against_its_config(kind, dense, tokens):
    fwd_pruner = FwdPruner(dense)
    config, architecture = dense.config, get_architecture(dense.config)
    if kind == "layers":
        path, _ = architecture.layers(dense)[0]
        container = path.rpartition(".")[0]
        parent, _, name = container.rpartition(".")
        setattr(dense.get_submodule(parent), name, dense.get_submodule(container)[:2])
        words = "num_hidden_layers is 3"
    elif kind == "heads":
        words = architecture.layout.attention.heads_key
        setattr(config, words, 12)
    elif kind == "widths":
        words = architecture.layout.mlp.width_key
        # BLOOM works its width out of the hidden size.
        words = words if hasattr(config, words) else "hidden_size"
        setattr(config, words, 192)
    else:
        config.vocab_size, words = 400, "vocab_size=400"
    with pytest.raises(ValueError, match=words):
        fwd_pruner.prune(PruningConfig(**BOTH_KINDS), tokens)
    assert all(parameter.numel() for parameter in dense.parameters())
