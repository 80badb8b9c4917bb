"""Pruned models that other code trains and saves keep their plan and record."""

import copy
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_fwdprune import FwdPruner, PruningPlan, RecoveryArguments
from optimum_fwdprune.record.record import OUTCOME_NAME


CUT = {"method": "magnitude", "kinds": ["attention", "mlp"], "reconstruction": "none", "sparsity": 0.4}


@pytest.fixture
def pruner(tokenizer):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.prune(**CUT)
    return pruner


def trainer_of(model, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    args = TrainingArguments(
        output_dir=str(tmp_path / "training"), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    return Trainer(model, args, train_dataset=rows)


def files_of_the_record(folder):
    names = ("fwdprune_plan.json", "fwdprune_config.json", "fwdprune/scores.safetensors", OUTCOME_NAME)
    return {name for name in names if (folder / name).is_file()}


@pytest.mark.parametrize("opened", ["pruned here", "loaded"])
def test_a_plain_trainer_keeps_plan_and_record(pruner, tokens, tmp_path, opened):
    plan = pruner.plan
    if opened == "loaded":
        pruner.save_pretrained(tmp_path / "pruned")
        pruner = FwdPruner.from_pretrained(tmp_path / "pruned")
    trainer = trainer_of(pruner.model, tokens, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = FwdPruner.from_pretrained(tmp_path / "trained")

    assert len(files_of_the_record(tmp_path / "trained")) == 4
    assert again.plan.kept == plan.kept and again.config == pruner.config
    assert again.report.parameters_before == pruner.report.parameters_before
    again.save_pretrained(tmp_path / "saved")
    assert PruningPlan.load(tmp_path / "saved").kept == plan.kept


def test_the_pruner_saves_what_another_trainer_trained(pruner, tokens, tmp_path):
    trainer_of(pruner.model, tokens, tmp_path).train()
    pruner.recovery = {"mode": "a Trainer of my own"}
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    pruner.model.eval()
    assert torch.equal(loaded(tokens).logits, pruner.model(tokens).logits)
    assert "- mode: a Trainer of my own" in (tmp_path / "out" / "README.md").read_text()


def test_copies_keep_the_record_and_recovery_updates_it(pruner, tokens, tmp_path):
    copy.deepcopy(pruner.model).save_pretrained(tmp_path / "copy")
    assert len(files_of_the_record(tmp_path / "copy")) == 4
    args = RecoveryArguments(output_dir=str(tmp_path / "x"), max_steps=1, use_cpu=True, save_strategy="no")
    pruner.recover({"input_ids": tokens}, args).save_pretrained(tmp_path / "recovered")

    assert json.loads((tmp_path / "recovered" / OUTCOME_NAME).read_text())["recovery"]["mode"] == "lora"


def test_a_checkpoint_without_a_record_is_saved_and_recovered(pruner, tokens, tmp_path):
    """As a model is that was loaded without this package, trained and saved."""
    vars(pruner.model).pop("pruning_record", None)
    pruner.model.save_pretrained(tmp_path / "plain")
    assert files_of_the_record(tmp_path / "plain") == set()
    plain = FwdPruner.from_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "saved")
    args = RecoveryArguments(
        output_dir=str(tmp_path / "x"), max_steps=1, use_cpu=True, save_strategy="no", mode="full"
    )
    plain.recover({"input_ids": tokens}, args)
    plain.save_pretrained(tmp_path / "recovered")

    assert FwdPruner.from_pretrained(tmp_path / "recovered").recovery["mode"] == "full"
