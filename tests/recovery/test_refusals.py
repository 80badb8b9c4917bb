"""What recovery cannot train or could not save is refused before anything is done."""

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments


REQUEST = PruningConfig(method="magnitude", kinds=["attention", "mlp"], reconstruction="none", sparsity=0.4)


def arguments(tmp_path, **changes):
    values = {"output_dir": str(tmp_path / "training"), "max_steps": 2, "use_cpu": True, "save_strategy": "no"}
    return RecoveryArguments(**values | changes)


def assert_refused(pruner, tmp_path, tokens, message, **changes):
    before = {name: value.clone() for name, value in pruner.model.state_dict().items() if not value.is_meta}
    with pytest.raises(ValueError, match=message):
        pruner.recover({"input_ids": tokens}, arguments(tmp_path, **changes))
    after = pruner.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert pruner.trainer is None and not (tmp_path / "training").exists()


def test_a_dense_model_is_refused(tmp_path, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    assert_refused(pruner, tmp_path, tokens, r"LlamaForCausalLM is dense: call prune\(\) first")


@pytest.mark.parametrize("mode", ["lora", "full", "distill"])
@pytest.mark.parametrize("opened", ["dense", "pruned"])
def test_layers_on_disk_are_refused(tmp_path, tokens, mode, opened):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=opened == "dense")
    pruner.prune(REQUEST)
    if opened == "pruned":
        pruner.save_pretrained(tmp_path / "pruned")
        pruner = FwdPruner.from_pretrained(tmp_path / "pruned", low_memory=True)
    assert_refused(pruner, tmp_path, tokens, r"offloaded.*save_pretrained and load it without low_memory", mode=mode)


OFFLOADING = {
    "cpu_offload": lambda model, _folder: cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "device_map": lambda model, folder: dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"},
        main_device="cpu",
        offload_dir=folder,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize("way", OFFLOADING)
def test_every_way_of_offloading_is_refused(tmp_path, tokens, way):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(REQUEST)
    pruner.model = OFFLOADING[way](pruner.model, tmp_path / "offloaded")
    assert_refused(pruner, tmp_path, tokens, "Layers of this model are offloaded", mode="full")


def test_adapters_of_others_are_refused(tmp_path, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(REQUEST)
    get_peft_model(pruner.model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert_refused(pruner, tmp_path, tokens, r"q_proj has an adapter around it.*merge_and_unload\(\)")


def test_task_heads_are_left_to_their_own_training(tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", AutoModelForSequenceClassification))
    pruner.prune(tiny.request(sparsity=0.3), tokens)
    with pytest.raises(ValueError, match=r"predicts no tokens. Train it with transformers.Trainer"):
        pruner.recover(tokens, RecoveryArguments(str(tmp_path / "training"), use_cpu=True, max_steps=1))


def test_adapters_of_tied_weights_are_refused_and_leave_the_model_plain(tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    pruner.prune(tiny.request(sparsity=0.3), tokens)
    names = [name for name, _ in pruner.model.named_parameters()]
    arguments = RecoveryArguments(
        str(tmp_path / "training"), use_cpu=True, max_steps=1, report_to="none", lora_targets=["lm_head"]
    )
    with pytest.raises(ValueError, match="'lm_head', whose weight is tied to that of embed_tokens"):
        pruner.recover(tokens, arguments)

    assert [name for name, _ in pruner.model.named_parameters()] == names
