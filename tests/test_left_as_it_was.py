"""What a run leaves behind: the model, its modules and the process are as they were, whether it succeeds or fails."""

import copy

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, PruningConfig


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
