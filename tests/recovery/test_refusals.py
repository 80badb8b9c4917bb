"""What recovery cannot train or could not save is refused before anything is done."""

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, TrainerCallback

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
    assert_refused(pruner, tmp_path, tokens, "LlamaForCausalLM is dense: prune it first")


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
    assert_refused(pruner, tmp_path, tokens, r"q_proj has an adapter, which.*merge_and_unload\(\)")


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


class NeedsArguments(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"lora_targets": ["q_proj", "nope"]}, {}, "ends in 'nope'; lora_targets takes all-linear, or.*q_proj"),
        ({"lora_targets": []}, {}, "lora_targets is empty"),
        ({"lora_targets": ["input_layernorm"]}, {}, r"lora_targets=\['input_layernorm'\] cannot get adapters"),
        ({}, {"callbacks": 5}, "callbacks must be objects or subclasses.*got a int"),
        ({}, {"callbacks": {"a": 1}}, "callbacks must be objects or subclasses.*got a dict"),
        ({}, {"callbacks": NeedsArguments}, "NeedsArguments needs arguments"),
        ({}, {"callbacks": [EarlyStoppingCallback(3)]}, "EarlyStoppingCallback compares evaluations"),
        (EVALUATED, {"callbacks": EarlyStoppingCallback, "eval_dataset": []}, "metric_for_best_model='eval_loss'"),
        ({**EVALUATED, "metric_for_best_model": "accuracy"}, {"eval_dataset": []}, "'accuracy' is not measured"),
    ],
)
def test_what_would_fail_late_is_refused_before_data_is_read(tmp_path, changes, options, message):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(REQUEST)
    names = [name for name, _ in pruner.model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        pruner.recover(None, arguments(tmp_path, **changes), **options)

    assert [name for name, _ in pruner.model.named_parameters()] == names
    assert not (tmp_path / "training").exists()


def test_checkpoints_of_other_runs_are_refused_before_data_is_read(tmp_path, tokens):
    def resume(folder, mode, sparsity=0.4):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(REQUEST, sparsity=sparsity)
        options = {"mode": mode, "max_steps": 4, "resume_from_checkpoint": str(folder)}
        pruner.recover(None, arguments(tmp_path, **options))

    folders = {}
    for mode in ("lora", "full"):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(REQUEST)
        options = {"mode": mode, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        pruner.recover({"input_ids": tokens}, arguments(tmp_path, output_dir=str(tmp_path / mode), **options))
        folders[mode] = tmp_path / mode / "checkpoint-1"

    with pytest.raises(ValueError, match=r"belongs to another model: .*q_proj.weight has the shape"):
        resume(folders["full"], "full", sparsity=0.2)
    with pytest.raises(ValueError, match="holds adapters, and this run trains all weights"):
        resume(folders["lora"], "full")
    with pytest.raises(ValueError, match="holds no adapters"):
        resume(folders["full"], "lora")
    (folders["full"] / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state\.json is damaged"):
        resume(folders["full"], "full")
    with pytest.raises(ValueError, match="is no checkpoint of a run"):
        resume(tmp_path, "full")
    with pytest.raises(ValueError, match="There is no checkpoint 5"):
        resume(5, "full")


def test_frozen_weights_are_refused_where_they_are_all_and_recorded_where_they_are_some(tmp_path, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(REQUEST)
    pruner.model.requires_grad_(False)
    with pytest.raises(ValueError, match="All parameters of the model are frozen"):
        pruner.recover(None, arguments(tmp_path, mode="full"))
    head = pruner.model.lm_head.weight.requires_grad_(True)
    pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode="full"))
    pruner.save_pretrained(tmp_path / "saved")

    total = sum(parameter.numel() for parameter in pruner.model.parameters())
    frozen = f"{total - head.numel():,} of {total:,} parameters"
    assert pruner.recovery["frozen"] == frozen
    assert f"it was trained in part, with {frozen} frozen, for 2 steps" in (tmp_path / "saved/README.md").read_text()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_also_where_the_caller_switched_them_off(tmp_path, tokens, context):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(REQUEST)
    before = pruner.model.lm_head.weight.clone()
    with context():
        pruner.recover({"input_ids": tokens}, arguments(tmp_path, mode="full", learning_rate=1e-2))
    assert not torch.equal(pruner.model.lm_head.weight, before)
    with torch.inference_mode():
        made = FwdPruner(tiny.make_model("llama_gqa_biases"))
        made.prune(REQUEST)
    with pytest.raises(ValueError, match=r"were made under torch\.inference_mode"):
        made.recover(None, arguments(tmp_path))
