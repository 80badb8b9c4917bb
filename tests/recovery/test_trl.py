"""TRL's trainers take pruned models, and keep their record. They are tested where TRL is installed."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from optimum_fwdprune import FwdPruner, PruningConfig


trl = pytest.importorskip("trl", reason="TRL is not installed")

REQUEST = PruningConfig(method="magnitude", kinds=["attention", "mlp"], reconstruction="none", sparsity=0.4)
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHATS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the lazy dog"}]}] * 8
)
OPTIONS = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "bf16": False}


@pytest.fixture
def pruner(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    chatty.pad_token = chatty.eos_token
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), chatty)
    pruner.prune(REQUEST)
    return pruner


def assert_trained_and_kept(pruner, trainer, folder):
    before = pruner.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(pruner.model.lm_head.weight, before)
    trainer.save_model(folder)
    assert FwdPruner.from_pretrained(folder).plan == pruner.plan


def test_sft(pruner, tmp_path):
    args = trl.SFTConfig(output_dir=str(tmp_path / "sft"), max_length=32, **OPTIONS)
    trainer = trl.SFTTrainer(pruner.model, args=args, train_dataset=CHATS, processing_class=pruner.tokenizer)
    assert_trained_and_kept(pruner, trainer, tmp_path / "saved")


def test_sft_with_adapters(pruner, tmp_path):
    plan = pruner.plan
    args = trl.SFTConfig(output_dir=str(tmp_path / "sft"), max_length=32, **OPTIONS)
    adapters = LoraConfig(task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        pruner.model, args=args, train_dataset=CHATS, processing_class=pruner.tokenizer, peft_config=adapters
    )
    trainer.train()
    pruner.model = trainer.model.merge_and_unload()
    pruner.save_pretrained(tmp_path / "saved")

    assert FwdPruner.from_pretrained(tmp_path / "saved").plan == plan


def test_distillation(pruner, tmp_path):
    args = trl.DistillationConfig(output_dir=str(tmp_path / "distilled"), max_completion_length=4, **OPTIONS)
    trainer = trl.DistillationTrainer(
        pruner.model,
        teacher_model=tiny.make_model("llama_gqa_biases"),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "the fox"}]}] * 8),
        processing_class=pruner.tokenizer,
    )
    assert_trained_and_kept(pruner, trainer, tmp_path / "saved")


def test_gkd(pruner, tmp_path):
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError:
        GKDConfig, GKDTrainer = trl.GKDConfig, trl.GKDTrainer
    args = GKDConfig(output_dir=str(tmp_path / "gkd"), max_length=32, max_new_tokens=4, **OPTIONS)
    trainer = GKDTrainer(
        pruner.model,
        teacher_model=tiny.make_model("llama_gqa_biases"),
        args=args,
        train_dataset=CHATS,
        processing_class=pruner.tokenizer,
    )
    assert_trained_and_kept(pruner, trainer, tmp_path / "saved")
