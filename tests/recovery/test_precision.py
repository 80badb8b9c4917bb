"""Matrices are multiplied in bfloat16 where the processor has instructions for it; weights are trained in float32."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, RecoveryArguments


@pytest.fixture
def processor(monkeypatch):
    """Sets whether the processor has instructions for bfloat16; no accelerator is there."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return lambda has: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has}, raising=False)


@pytest.mark.parametrize(
    ("has", "asked", "used"), [(True, None, True), (False, None, False), (True, False, False), (False, True, True)]
)
def test_the_default_follows_the_processor(processor, tmp_path, has, asked, used):
    processor(has)
    args = RecoveryArguments(str(tmp_path), bf16=asked)
    assert (args.bf16, args.device.type) == (used, "cpu")


def test_bfloat16_is_not_the_default_where_the_processor_is_unknown(processor, monkeypatch, tmp_path):
    processor(True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not RecoveryArguments(str(tmp_path)).bf16


@pytest.mark.parametrize("mode", ["full", "distill", "block_distill"])
@pytest.mark.parametrize("has", [True, False])
def test_products_of_a_training_are_computed_in_bfloat16(processor, tokenizer, tokens, tmp_path, mode, has):
    processor(has)
    dense = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.prune(tiny.request(sparsity=0.4), tokens)
    seen = []

    def trained(linear, _inputs, output):
        if torch.is_grad_enabled():
            seen.append((output.dtype, linear.weight.dtype))

    pruner.model.model.layers[0].mlp.down_proj.register_forward_hook(trained)
    # Whose time is estimated before the training, in the same precision.
    options = {"tokens": 256, "max_length": 16, "save_strategy": "no", "disable_tqdm": True}
    args = RecoveryArguments(str(tmp_path / "training"), mode=mode, adapters=False, **options)
    pruner.recover(tokens, args, teacher=None if mode == "full" else dense)

    assert set(seen) == {(torch.bfloat16 if has else torch.float32, torch.float32)}
