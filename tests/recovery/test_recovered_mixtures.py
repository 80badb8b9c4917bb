"""Mixtures that lost experts learn with their routers, and stay checkpoints of their stock class."""

import pytest
import tiny_mixtures
import torch
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, RecoveryArguments
from optimum_fwdprune.evaluation import texts_loss
from optimum_fwdprune.recovery.adapters import with_adapters
from optimum_fwdprune.recovery.options import RecoveryOptions


TEXTS = ["the quick brown fox jumps over the lazy dog", "the lazy dog and the brown fox are quick"] * 40


def pruner_of(name, tokenizer, tokens, **changes):
    pruner = FwdPruner(tiny_mixtures.make_mixture(name, **changes), tokenizer)
    pruner.prune(None, tokens, kinds=["expert"], sparsity=0.5, reconstruction="none")
    return pruner


def arguments(folder, **changes):
    values = {"output_dir": str(folder / "training"), "max_length": 16, "max_steps": 12, "logging_steps": 1}
    values |= {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "use_cpu": True, "save_strategy": "no"}
    return RecoveryArguments(**values, disable_tqdm=True, **changes)


@pytest.mark.parametrize(("name", "mode"), [("qwen3_moe", "lora"), ("gpt_oss", "lora"), ("mixtral", "full")])
def test_experts_that_are_left_learn_and_load_as_a_stock_checkpoint(name, mode, tokenizer, tokens, tmp_path):
    balancing = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    pruner = pruner_of(name, tokenizer, tokens, **balancing)
    before = {key: value.clone() for key, value in pruner.model.state_dict().items()}
    loss = texts_loss(pruner.model, tokenizer, TEXTS[:4]).loss
    recovered = pruner.recover(TEXTS, arguments(tmp_path, mode=mode))

    assert texts_loss(recovered, tokenizer, TEXTS[:4]).loss < loss - 0.1
    changed = {
        key.rpartition("mlp.")[2] for key, value in recovered.state_dict().items() if (value != before[key]).any()
    }
    assert {"experts.gate_up_proj", "experts.down_proj"} <= changed
    assert mode == "lora" or "gate.weight" in changed
    first = pruner.trainer.state.log_history[0]["loss"]
    # The balance of the experts that are left is a part of the loss, and a small one.
    assert abs(first - loss) < 0.2 * loss
    pruner.save_pretrained(tmp_path / "recovered")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    assert type(loaded) is type(recovered) and type(loaded).__name__.startswith(("Qwen3Moe", "GptOss", "Mixtral"))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, recovered(tokens).logits)
    again = FwdPruner.from_pretrained(tmp_path / "recovered")
    assert again.recovery["steps"] == 12 and again.plan.kept == pruner.plan.kept
    card = (tmp_path / "recovered" / "README.md").read_text()
    assert "Afterwards it was trained" in card and "the routers chose" in card


def test_weights_of_experts_are_targets_of_adapters_by_name():
    model = tiny_mixtures.make_mixture("mixtral")
    with pytest.raises(ValueError, match="lora_targets takes all-linear, or some of down_proj, gate_up_proj, k_proj"):
        with_adapters(model, RecoveryOptions(lora_targets=["q_proj", "fc1"]))
    adapted = with_adapters(model, RecoveryOptions(lora_targets=["q_proj", "down_proj"]))

    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad and "layers.0" in name}
    assert {name.partition(".lora")[0].rpartition("layers.0.")[2] for name in trained} == {
        "self_attn.q_proj",
        "mlp.experts",
    }
    # Rank 8 in each of 8 experts, whose projections read 24 features.
    assert {value.numel() for name, value in trained.items() if "experts.lora_A" in name} == {8 * 8 * 24}
