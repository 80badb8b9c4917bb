"""Distillation by blocks: every layer learns the dense model's hidden states, in the memory of one layer."""

import copy
import json
import re

import pytest
import tiny
import tiny_multimodal
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.recovery.blockwise.training import BlockTrainer, relative_error


REQUEST = PruningConfig(method="magnitude", kinds=["attention", "mlp"], reconstruction="none", sparsity=0.4)


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path / "training"),
        "mode": "block_distill",
        "max_length": 24,
        "num_train_epochs": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return RecoveryArguments(**values | changes)


def pruner_of(name="llama_gqa_biases", **changes):
    pruner = FwdPruner(tiny.make_model(name))
    pruner.prune(REQUEST, kinds=tiny.kinds_of(name), **changes)
    return pruner


def without(plan_of, *gone):
    """A plan that removes whole layers (a number) and sublayers (a number and a kind) besides."""
    kept = {key: [] if key.layer in gone or tuple(key) in gone else units for key, units in plan_of.kept.items()}
    return type(plan_of)(kept, plan_of.num_units, plan_of.model_type, plan_of.attention_unit)


def recover(pruner, tmp_path, tokens, name="llama_gqa_biases", **changes):
    return pruner.recover({"input_ids": tokens}, arguments(tmp_path, **changes), teacher=tiny.make_model(name))


def errors_of(pruner):
    return [(block["held-out error before"], block["held-out error after"]) for block in pruner.recovery["blocks"]]


@torch.no_grad()
def streams_apart(pruned, dense, tokens, layer, dense_layer):
    """The error after a layer of the pruned model against the stream after one of the dense model, by whole passes."""
    seen = []
    for model, number in ((pruned, layer), (dense, dense_layer)):
        module = model.get_decoder().layers[number]
        handle = module.register_forward_hook(
            lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        model(tokens)
        handle.remove()
    return float(((seen[0] - seen[1]).square().sum(-1) / seen[1].square().sum(-1)).mean())


def test_every_layout_learns_and_saves_a_plain_checkpoint(architecture_name, tokens, tmp_path):
    pruner = pruner_of(architecture_name)
    recovered = recover(pruner, tmp_path, tokens, architecture_name)

    assert all(after is not None and after < 0.95 * before for before, after in errors_of(pruner))
    assert not recovered.training and pruner.trainer is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in recovered.parameters())
    pruner.save_pretrained(tmp_path / "recovered")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    assert torch.equal(loaded(tokens).logits, recovered(tokens).logits)
    assert not (tmp_path / "training").exists()


def test_a_removed_layer_counts_for_the_layer_before_it(tokens, tmp_path):
    """Errors are those of whole passes; the second layer is removed, and the third has no MLP."""
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(plan=without(pruner_of().plan, 1, (2, "mlp")))
    dense, before = tiny.make_model("llama_gqa_biases"), copy.deepcopy(pruner.model)
    held_out = tokens[15:]
    recovered = recover(pruner, tmp_path, tokens)

    first, second = pruner.recovery["blocks"]
    assert first["held-out error before"] == pytest.approx(streams_apart(before, dense, held_out, 0, 1), rel=1e-4)
    assert first["held-out error after"] == pytest.approx(streams_apart(recovered, dense, held_out, 0, 1), rel=1e-4)
    assert second["held-out error after"] == pytest.approx(streams_apart(recovered, dense, held_out, 1, 2), rel=1e-4)
    # The second block was judged after the first one was trained.
    assert second["held-out error before"] != pytest.approx(streams_apart(before, dense, held_out, 1, 2), rel=1e-3)


def test_first_layers_that_are_removed_count_for_the_first_that_is_kept(tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(plan=without(pruner_of().plan, 0))
    recovered, dense = recover(pruner, tmp_path, tokens), tiny.make_model("llama_gqa_biases")

    expected = streams_apart(recovered, dense, tokens[15:], 0, 1)
    assert errors_of(pruner)[0][1] == pytest.approx(expected, rel=1e-4)


def test_several_layers_are_one_block(tokens, tmp_path):
    pruner = pruner_of()
    recovered = recover(pruner, tmp_path, tokens, layers_per_block=2)

    assert [block["layers"] for block in pruner.recovery["blocks"]] == [[0, 1], [2, 2]]
    expected = streams_apart(recovered, tiny.make_model("llama_gqa_biases"), tokens[15:], 1, 1)
    assert errors_of(pruner)[0][1] == pytest.approx(expected, rel=1e-4)


def test_layers_on_disk_are_trained_as_those_in_memory(tokens, tmp_path):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    pruner_of().save_pretrained(tmp_path / "pruned")
    models = []
    for low_memory in (False, True):
        pruner = FwdPruner.from_pretrained(tmp_path / "pruned", low_memory=low_memory)
        args = arguments(tmp_path, teacher=str(tmp_path / "dense"))
        pruner.recover({"input_ids": tokens}, args)
        assert any(parameter.is_meta for parameter in pruner.model.parameters()) == low_memory
        assert torch.equal(pruner.model(tokens).logits, pruner.model(tokens).logits)
        pruner.save_pretrained(tmp_path / f"recovered-{low_memory}")
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"recovered-{low_memory}"))
        if low_memory:
            assert torch.equal(models[-1](tokens).logits, pruner.model(tokens).logits)

    for (name, expected), (_, value) in zip(models[0].named_parameters(), models[1].named_parameters()):
        assert torch.equal(expected, value), name


class Interruption:
    """Interrupts the training of the third block, once the second one is done."""

    def __init__(self, monkeypatch):
        fit, calls = BlockTrainer.fit, []

        def interrupted(self, block):
            calls.append(block)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return fit(self, block)

        monkeypatch.setattr(BlockTrainer, "fit", interrupted)
        self.calls = calls


def test_files_of_the_user_stay(tokens, tmp_path):
    own = [tmp_path / "training" / folder / "notes.txt" for folder in ("blocks", "hidden_states")]
    for file in own:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    for _ in range(2):
        recover(pruner_of(), tmp_path, tokens, save_strategy="steps", hidden_states_gb=0.0, max_steps=1)

    assert [file.read_text() for file in own] == ["mine", "mine"]
    assert {file.name for file in own[1].parent.iterdir()} == {"notes.txt"}
    assert len(list(own[0].parent.iterdir())) == 5


@pytest.mark.parametrize("loaded_again", [False, True])
def test_a_run_that_was_interrupted_resumes_as_if_it_had_not_been(loaded_again, tokens, tmp_path, monkeypatch):
    expected = recover(pruner_of(), tmp_path, tokens).state_dict()
    pruner = pruner_of()
    with monkeypatch.context() as context:
        Interruption(context)
        with pytest.raises(KeyboardInterrupt):
            recover(pruner, tmp_path, tokens, save_strategy="steps")
    assert pruner.recovery["interrupted by"] == "KeyboardInterrupt" and len(pruner.recovery["blocks"]) == 2
    if loaded_again:
        pruner = pruner_of()
    counted = Interruption(monkeypatch)
    found = recover(pruner, tmp_path, tokens, save_strategy="steps", resume_from_checkpoint="true").state_dict()

    assert len(counted.calls) == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(pruner.recovery["blocks"]) == 3 and "earlier" not in pruner.recovery
    with pytest.raises(ValueError, match=r"belongs to another run: .*learning_rate"):
        recover(pruner_of(), tmp_path, tokens, learning_rate=1e-3, resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="is one of another model: the weights of layer 0 differ"):
        recover(pruner_of(sparsity=0.3), tmp_path, tokens, resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="There are no trained blocks to resume from"):
        recover(pruner_of(), tmp_path, tokens, output_dir=str(tmp_path / "no"), resume_from_checkpoint="true")


def test_hidden_states_in_files_are_those_in_memory(tokens, tmp_path):
    rows = [{"input_ids": row[: 8 + place].tolist()} for place, row in enumerate(tokens)]
    models = []
    for limit in (1.0, 0.0):
        pruner, teacher = pruner_of(), tiny.make_model("llama_gqa_biases")
        models.append(pruner.recover(rows, arguments(tmp_path, hidden_states_gb=limit), teacher=teacher))

    assert all(
        torch.equal(own, other) for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
    assert not (tmp_path / "training").exists()


def test_padding_changes_nothing(tokens, tmp_path):
    """The error of short sequences in a batch with long ones is that of each alone."""
    rows = [{"input_ids": row[: 6 + place].tolist()} for place, row in enumerate(tokens)]
    pruner, dense = pruner_of(), tiny.make_model("llama_gqa_biases")
    before = copy.deepcopy(pruner.model)
    pruner.recover(rows, arguments(tmp_path), eval_dataset=rows[:5], teacher=dense)

    total, count = 0.0, 0
    for row in rows[:5]:
        ids = torch.tensor([row["input_ids"]])
        total, count = total + streams_apart(before, dense, ids, 0, 0) * ids.numel(), count + ids.numel()
    assert errors_of(pruner)[0][0] == pytest.approx(total / count, rel=1e-4)


def test_weights_of_a_block_that_gets_worse_are_those_before(tokens, tmp_path):
    pruner = pruner_of()
    before = copy.deepcopy(pruner.model.state_dict())
    recovered = recover(pruner, tmp_path, tokens, learning_rate=1e3)

    assert [after for _, after in errors_of(pruner)] == [None] * 3
    assert all(torch.equal(value, before[name]) for name, value in recovered.state_dict().items())


def test_a_dispatched_model_is_trained_on_its_devices(tokens, tmp_path):
    expected = recover(pruner_of(), tmp_path, tokens)
    pruner = pruner_of()
    pruner.model = dispatch_model(
        pruner.model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True
    )
    found = recover(pruner, tmp_path, tokens)

    assert all(torch.equal(own, other) for own, other in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_the_language_model_of_a_multimodal_model_is_trained(name, tokens, tmp_path):
    models = [tiny_multimodal.make_model(name) for _ in range(2)]
    pruner = FwdPruner(models[0])
    pruner.prune(REQUEST)
    before = copy.deepcopy(pruner.model.state_dict())
    pruner.recover({"input_ids": tokens % 200}, arguments(tmp_path), teacher=models[1])

    assert sum(after is not None for _, after in errors_of(pruner)) >= 3
    changed = {key for key, value in pruner.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all("language_model.layers" in key for key in changed)


def test_steps_too_small_for_16_bits_add_up(tokens, tmp_path):
    pruner = pruner_of()
    pruner.model.to(torch.bfloat16)
    recover(pruner, tmp_path, tokens, learning_rate=3e-4, num_train_epochs=30)

    assert {parameter.dtype for parameter in pruner.model.parameters()} == {torch.bfloat16}
    assert all(after is not None and after < 0.97 * before for before, after in errors_of(pruner))


def test_frozen_weights_stay(tokens, tmp_path):
    pruner = pruner_of()
    frozen = pruner.model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    before = frozen.detach().clone()
    recover(pruner, tmp_path, tokens)

    assert torch.equal(pruner.model.model.layers[0].mlp.down_proj.weight, before)
    assert errors_of(pruner)[0][1] is not None and "frozen" in pruner.recovery


def test_the_whole_model_is_trained_afterwards_and_both_are_recorded(tokens, tmp_path):
    pruner = pruner_of()
    recover(pruner, tmp_path, tokens, then="distill", adapters=False)
    pruner.save_pretrained(tmp_path / "saved")

    assert pruner.recovery["mode"] == "distill" and pruner.recovery["learning rate"] == 1e-4
    (blocks,) = pruner.recovery["earlier"]
    assert blocks["mode"] == "block_distill" and len(blocks["blocks"]) == 3
    card = (tmp_path / "saved" / "README.md").read_text()
    assert re.search(
        r"layer by layer for 48 steps each.*, towards the hidden states.*; then in all weights for 48 steps", card
    )
    assert "- trained blocks: 3 of 3" in card and "- mode: distill" in card
    assert json.loads((tmp_path / "saved" / "fwdprune" / "outcome.json").read_text())["recovery"]["earlier"]


def test_massive_activations_weigh_as_much_as_any_other_token():
    wanted = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    wanted[0] *= 1e4
    found = 1.1 * wanted
    torch.testing.assert_close(relative_error(found, wanted), torch.full((5,), 0.01))


class Callback(TrainerCallback):
    pass


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"callbacks": [Callback]}, "callbacks and eval_strategy are the Trainer's"),
        ({"eval_strategy": "steps", "eval_steps": 1}, {"eval_dataset": []}, "callbacks and eval_strategy"),
        ({"teacher_cache": "folder"}, {}, "teacher_cache stores predictions"),
        ({"adapters": True}, {}, "adapters=True cannot be combined with mode='block_distill'"),
        ({"then": "lora", "adapters": False}, {}, "adapters=False cannot be combined with mode='lora'"),
        ({"then": "lora", "merge_adapters": False}, {}, "saves adapters without their base"),
        ({"then": "nothing"}, {}, "then must be one of lora, full, distill"),
        ({"mode": "lora", "then": "full"}, {}, "then='full' needs mode='block_distill'"),
        ({"layers_per_block": 0}, {}, "layers_per_block must be at least 1"),
        ({"hidden_states_gb": -1.0}, {}, "hidden_states_gb must be at least 0"),
        ({"optim": "lomo"}, {}, "(?i)lomo"),
    ],
)
def test_what_it_cannot_do_is_refused_before_data_is_read(tmp_path, changes, options, message):
    pruner = pruner_of()
    with pytest.raises((ValueError, ImportError), match=message):
        pruner.recover(None, arguments(tmp_path, **changes), teacher=tiny.make_model("llama_gqa_biases"), **options)
    assert not (tmp_path / "training").exists() and pruner.recovery is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 4}, "The teacher has 4 layers, the pruned model 3, and the plan is for 3 layers"),
        ({"hidden_size": 96}, "hidden states, which have 96 features in the teacher and 48"),
        ({"vocab_size": 301}, "vocabulary has 301 tokens"),
    ],
)
def test_teachers_of_other_sizes_are_refused(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        pruner_of().recover(None, arguments(tmp_path), teacher=tiny.make_model("llama_gqa_biases", **sizes))


def test_the_whole_model_on_disk_is_not_trained_afterwards(tokens, tmp_path):
    pruner_of().save_pretrained(tmp_path / "pruned")
    pruner = FwdPruner.from_pretrained(tmp_path / "pruned", low_memory=True)
    with pytest.raises(
        ValueError, match="then='distill' trains the whole model, and layers of this model are on disk"
    ):
        recover(pruner, tmp_path, tokens, then="distill")


def test_too_few_sequences_are_refused(tokens, tmp_path):
    with pytest.raises(ValueError, match="holds sequences of the training data out, and there is 1 of them"):
        recover(pruner_of(), tmp_path, tokens[:1])
