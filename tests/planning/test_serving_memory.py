"""`target_memory`: weights, KV cache and activations of a prefill, predicted without running the model."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.forward.memory import memory_of
from optimum_fwdprune.request.sizes import bytes_of


SERVING = {"context_tokens": 100, "serving_batch": 2}
REQUEST = {"reconstruction": "none", "method": "magnitude", **SERVING}


@torch.no_grad()
def test_weights_and_cache_are_those_of_the_model_that_runs(architecture_name):
    model = tiny.make_model(architecture_name)
    memory = memory_of(model, 2, 100)
    caches = model(torch.zeros(2, 100, dtype=torch.int64), use_cache=True).past_key_values.layers

    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    # A sliding window is a view of all keys, which stay in memory until the next token.
    assert memory.caches == tuple(
        layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in caches
    )
    # At least the inputs and outputs of an MLP, and not every layer's.
    config = model.config
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * config.hidden_size)
    assert 2 * 100 * 4 * width < memory.activations < 40 * 2 * 100 * 4 * width
    assert memory_of(model, 4, 100).activations == pytest.approx(2 * memory.activations, rel=0.05)


@pytest.mark.parametrize(
    "units",
    [
        {"kinds": ["mlp"]},
        {"kinds": ["attention", "mlp"], "attention_unit": "kv_group"},
        {"kinds": ["attention", "mlp"]},
        {"kinds": ["mlp"], "scope": "global"},
        {"kinds": ["sublayer"]},
    ],
)
def test_the_model_takes_what_was_asked_for(units):
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=6)
    dense = memory_of(model, 2, 100)
    target = int(0.85 * dense.total)
    pruner = FwdPruner(model)
    pruned = pruner.prune(target_memory=target, **REQUEST, **units)

    memory = memory_of(pruned, 2, 100)
    # A sublayer is a large step. With other scopes than layer, a layer may stay as wide as it was.
    coarse = units["kinds"] == ["sublayer"] or "scope" in units
    assert (0.85 if coarse else 0.97) * target < memory.total <= target
    assert pruner.plan.metadata["memory"]["cache"] == memory.cache
    shrinks = "attention_unit" in units or units["kinds"] == ["sublayer"]
    assert (memory.cache < dense.cache) == shrinks
    assert pruner.config.target_memory == target


def test_what_cannot_be_met_names_what_can_and_which_kinds_would_help():
    model = tiny.make_model("llama_gqa_biases")
    dense = memory_of(model, 2, 100)
    with pytest.raises(ValueError, match=r"smallest possible target_memory is [\d,]+ .*kinds with 'layer'") as raised:
        FwdPruner(model).prune(target_memory=dense.total // 10, kinds=["mlp"], **REQUEST)
    smallest = bytes_of(str(raised.value).partition("smallest possible target_memory is ")[2].split()[0])
    pruner = FwdPruner(model)
    assert memory_of(pruner.prune(target_memory=smallest, kinds=["mlp"], **REQUEST), 2, 100).total <= smallest
    with pytest.raises(ValueError, match="nothing would be pruned"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(target_memory=dense.total, **REQUEST)


def test_sizes_have_units():
    assert PruningConfig(target_memory="1.5GB").target_memory == 1_500_000_000
    assert PruningConfig(target_bytes="2 MiB").target_bytes == 2 * 2**20
    assert [bytes_of(size) for size in ("7", "1e9", "3kb", "6,000_000")] == [7, 10**9, 3000, 6 * 10**6]
    for size in ("6 apples", "GB", "1.2.3MB", "-1GB"):
        with pytest.raises(ValueError, match="is no size in bytes; write 6GB"):
            PruningConfig(target_memory=size)
    with pytest.raises(ValueError, match="two budgets"):
        PruningConfig(target_memory="1GB", target_bytes="1GB")


@pytest.mark.parametrize(
    ("context", "large", "fields", "begins"),
    [
        (100, 0.01, {"kinds": ["mlp"]}, ["The KV cache takes "]),
        (100, 0.9, {"kinds": ["mlp"]}, []),
        (100, 0.01, {"kinds": ["layer"]}, []),
        (100, 0.01, {"kinds": ["attention"], "attention_unit": "kv_group"}, []),
        (1000, 0.01, {"kinds": ["layer"]}, ["context_tokens is 1,000, and the model has 256 positions."]),
    ],
    ids=str,
)
def test_a_large_cache_and_a_long_context_are_warned_of_once(monkeypatch, context, large, fields, begins):
    said = []
    monkeypatch.setattr("optimum_fwdprune.planning.serving.LARGE_CACHE", large)
    monkeypatch.setattr(
        "optimum_fwdprune.planning.serving.logger.warning", lambda text, *args: said.append(text % args)
    )
    model = tiny.make_model("llama_gqa_biases", max_position_embeddings=256)
    request = {**REQUEST, "context_tokens": context, **fields}
    target = int(0.9 * memory_of(model, request["serving_batch"], context).total)
    FwdPruner(model).dry_run(target_memory=target, rounds=2, **request)
    assert [text[: len(start)] for text, start in zip(said, begins)] == begins and len(said) == len(begins)
