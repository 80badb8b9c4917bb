"""Every mode of recovery on tiny pruned models: it learns, saves, resumes and loads like a dense model does."""

import copy
import json
import math
import warnings

import datasets
import pytest
import tiny
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, RecoveryArguments
from optimum_fwdprune.evaluation import texts_loss
from optimum_fwdprune.loading.models import load_causal_lm
from optimum_fwdprune.record.record import OUTCOME_NAME
from optimum_fwdprune.recovery import recover
from optimum_fwdprune.recovery.distillation import TEACHER_IDS, divergence_from_teacher, kept_predictions


TEXTS = ["the quick brown fox jumps over the lazy dog", "the lazy dog and the brown fox are quick"] * 40
REQUEST = {"sparsity": 0.4, "scope": "global", "attention_unit": "kv_group"}


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path / "training"),
        "max_length": 16,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return RecoveryArguments(**values | changes)


def pruner_of(tokenizer, tokens, name="llama_gqa_biases"):
    pruner = FwdPruner(tiny.make_model(name), tokenizer)
    pruner.prune(tiny.request(**REQUEST), tokens)
    return pruner


@pytest.fixture
def dense_model():
    return tiny.make_model("llama_gqa_biases")


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="warnings of computers without an accelerator")
def test_training_on_a_cpu_warns_of_nothing_that_a_user_could_change(mode, tokenizer, tokens, tmp_path):
    pruner = pruner_of(tokenizer, tokens)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        pruner.recover(TEXTS, arguments(tmp_path, mode=mode, max_steps=1, use_cpu=False))

    noise = ("pin_memory", "is_gradient_checkpointing")
    assert [text for warning in shown if any(word in (text := str(warning.message)) for word in noise)] == []


def test_a_model_is_recovered_without_a_pruner(tokenizer, tokens, tmp_path, dense_model):
    model = pruner_of(tokenizer, tokens).model
    args = arguments(tmp_path, mode="distill", max_steps=2, eval_strategy="steps", eval_steps=1)
    before = {name: value.clone() for name, value in model.named_parameters()}

    trained, trainer = recover(model, tokenizer, TEXTS, args, eval_dataset=TEXTS[:4], teacher=dense_model)

    assert any(not torch.equal(value, before[name]) for name, value in trained.named_parameters())
    assert trainer.state.global_step == 2
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("llama_gqa_biases", mode) for mode in ("lora", "full", "distill")),
        *((name, "lora") for name in ("opt_pre_norm", "bloom", "mistral_sliding_window", "qwen3", "phi3", "gpt2")),
    ],
)
def test_every_mode_learns_and_leaves_a_plain_checkpoint(name, mode, tokenizer, tokens, tmp_path):
    pruner = pruner_of(tokenizer, tokens, name)
    before = texts_loss(pruner.model, tokenizer, TEXTS[:4]).loss
    sizes = {key: value.shape for key, value in pruner.model.state_dict().items()}
    teacher = tiny.make_model(name) if mode == "distill" else None
    recovered = pruner.recover(TEXTS, arguments(tmp_path, mode=mode), teacher=teacher)

    assert texts_loss(recovered, tokenizer, TEXTS[:4]).loss < before - 0.1
    assert {key: value.shape for key, value in recovered.state_dict().items()} == sizes
    assert not recovered.training
    pruner.save_pretrained(tmp_path / "recovered")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    assert type(loaded) is type(recovered)
    assert torch.equal(loaded(tokens).logits, recovered(tokens).logits)
    assert (tmp_path / "recovered" / "fwdprune_plan.json").exists()


def test_the_teacher_is_followed_and_not_the_text(dense_model, tokenizer, tokens, tmp_path):
    """With all weight on the divergence the student comes nearer to the teacher, on text that the teacher dislikes."""

    def divergence(model):
        with torch.no_grad():
            own, wanted = (each(tokens).logits.log_softmax(-1) for each in (model, dense_model))
        return float(torch.nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True))

    pruner = pruner_of(tokenizer, tokens)
    before = divergence(pruner.model)
    rows = {"input_ids": tokens.repeat(4, 1)}
    options = {"mode": "distill", "distill_weight": 1.0, "adapters": False, "max_steps": 40, "learning_rate": 1e-2}
    args = arguments(tmp_path, max_length=24, **options)
    pruner.recover(rows, args, teacher=dense_model)

    assert divergence(pruner.model) < 0.7 * before
    logged = pruner.trainer.state.log_history[0]
    assert logged["divergence"] > 0 and logged["cross_entropy"] > 0
    assert logged["loss"] == pytest.approx(logged["divergence"], rel=1e-3)


@torch.no_grad()
def test_the_loss_of_distillation_is_that_of_its_formula(dense_model, tokenizer, tokens, tmp_path):
    pruner = pruner_of(tokenizer, tokens)
    student = copy.deepcopy(pruner.model)
    ids = tokens[:4]
    own, wanted = student(ids, output_hidden_states=True), dense_model(ids, output_hidden_states=True)
    predicted, targets = own.logits[:, :-1].double(), ids[:, 1:]
    cross_entropy = -predicted.log_softmax(-1).gather(-1, targets[..., None]).mean()
    temperature = 2.0
    p = (wanted.logits[:, :-1].double() / temperature).softmax(-1)
    q = (predicted / temperature).log_softmax(-1)
    divergence = temperature**2 * (p * (p.log() - q)).sum(-1).mean()
    hidden = sum(
        float((a - b).square().mean() / b.square().mean()) for a, b in zip(own.hidden_states, wanted.hidden_states)
    ) / len(own.hidden_states)
    args = arguments(
        tmp_path,
        mode="distill",
        temperature=temperature,
        distill_weight=0.3,
        hidden_weight=0.5,
        max_length=24,
        max_steps=1,
        logging_steps=1,
        lora_dropout=0.0,
    )
    with torch.enable_grad():
        pruner.recover({"input_ids": ids}, args, teacher=dense_model)

    expected = 0.7 * float(cross_entropy) + 0.3 * float(divergence) + 0.5 * hidden
    assert pruner.trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulated_batches_are_one_batch(accumulation, dense_model, tokenizer, tokens, tmp_path):
    """Sequences of different lengths: a mean of means would weigh them wrongly."""
    rows = [{"input_ids": row[: 6 + 2 * place].tolist()} for place, row in enumerate(tokens[:8])]
    args = arguments(
        tmp_path,
        mode="distill",
        max_length=24,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        lora_dropout=0.0,
    )
    pruner = pruner_of(tokenizer, tokens)
    pruner.recover(datasets.Dataset.from_list(rows), args, teacher=dense_model)
    counted, total = 0, 0.0
    fresh = pruner_of(tokenizer, tokens).model
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            own, wanted = (each(ids).logits[0, :-1].double().log_softmax(-1) for each in (fresh, dense_model))
        total -= 0.5 * float(own.gather(-1, ids[0, 1:, None]).sum())
        total += 0.5 * float((wanted.exp() * (wanted - own)).sum())
        counted += len(own)

    assert pruner.trainer.state.log_history[0]["loss"] == pytest.approx(total / counted, rel=1e-4)


def test_steps_too_small_for_16_bits_reach_16_bit_weights(tokenizer, tokens, tmp_path):
    """All weights, at the default learning rate: as if they had been float32 and rounded in the end."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        pruner = pruner_of(tokenizer, tokens)
        for parameter in pruner.model.parameters():
            parameter.data = parameter.data.bfloat16().to(dtype)
        found[dtype] = pruner.recover(TEXTS, arguments(tmp_path, mode="full", learning_rate=None, max_steps=30))

    expected = found[torch.float32].state_dict()
    for name, value in found[torch.bfloat16].state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].bfloat16()), name


@pytest.mark.parametrize("cached", [False, True])
def test_an_offloaded_teacher_is_followed_where_it_computes(cached, dense_model, tokenizer, tokens, tmp_path):
    options = {"mode": "distill", "max_steps": 1, "logging_steps": 1}
    options |= {"teacher_cache": str(tmp_path / "kept")} if cached else {}
    pruner = pruner_of(tokenizer, tokens)
    pruner.recover(
        {"input_ids": tokens},
        arguments(tmp_path, **options),
        teacher=cpu_offload(dense_model, execution_device=torch.device("cpu")),
    )

    assert math.isfinite(pruner.trainer.state.log_history[0]["loss"])


class TestKeptPredictions:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_a_student_that_predicts_the_same_is_at_no_distance(self, temperature):
        logits = 2 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
        kept, ids = logits.log_softmax(-1).topk(5)

        assert float(divergence_from_teacher(logits, kept, ids, temperature)) == pytest.approx(0, abs=1e-5)
        assert float(divergence_from_teacher(logits.roll(1, -1), kept, ids, temperature)) > 0.1

    def test_with_the_whole_vocabulary_they_teach_what_the_live_teacher_does(
        self, dense_model, tokenizer, tokens, tmp_path
    ):
        options = {"mode": "distill", "logging_steps": 1, "max_steps": 6, "lora_dropout": 0.0, "seed": 3}
        rows = {"input_ids": tokens}
        live, kept = pruner_of(tokenizer, tokens), pruner_of(tokenizer, tokens)
        live.recover(rows, arguments(tmp_path, **options), teacher=dense_model)
        cached = {"teacher_cache": str(tmp_path / "kept"), "teacher_top_k": tiny.VOCAB}
        kept.recover(rows, arguments(tmp_path, **options, **cached), teacher=dense_model)

        losses = [[each["loss"] for each in run.trainer.state.log_history[:-1]] for run in (live, kept)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 6

    def test_the_teacher_is_asked_once_and_not_needed_again(self, dense_model, tokenizer, tokens, tmp_path):
        dense_model.save_pretrained(tmp_path / "dense")
        options = {"mode": "distill", "max_steps": 2, "teacher_cache": str(tmp_path / "kept"), "teacher_top_k": 5}
        options |= {"teacher": str(tmp_path / "dense"), "max_length": 24}
        rows = {"input_ids": tokens}
        pruner_of(tokenizer, tokens).recover(rows, arguments(tmp_path, **options))
        identity = json.loads((tmp_path / "kept" / "teacher.json").read_text())
        found = kept_predictions(tmp_path / "kept", identity)
        (tmp_path / "dense" / "model.safetensors").unlink()
        again = pruner_of(tokenizer, tokens)
        again.recover(rows, arguments(tmp_path, **options))

        with torch.no_grad():
            wanted = dense_model(tokens[:1]).logits[0].log_softmax(-1).topk(5)
        # Sequences are read in order; as many as the steps need.
        assert found[0]["input_ids"] == tokens[0].tolist() and len(found) == 8
        assert torch.equal(torch.tensor(found[0][TEACHER_IDS]), wanted.indices)
        assert again.trainer.state.global_step == 2
        assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []

    def test_those_of_other_sequences_or_teachers_are_refused(self, dense_model, tokenizer, tokens, tmp_path):
        options = {"mode": "distill", "max_steps": 1, "teacher_cache": str(tmp_path / "kept")}
        pruner_of(tokenizer, tokens).recover(
            {"input_ids": tokens}, arguments(tmp_path, **options), teacher=dense_model
        )
        with pytest.raises(ValueError, match="other sequences or from another teacher: its tokens is"):
            pruner_of(tokenizer, tokens).recover(
                {"input_ids": tokens.flip(0)}, arguments(tmp_path, **options), teacher=dense_model
            )
        # Labels are kept too, and say what is trained on.
        answers = {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(tokens.shape[1]) < 12, -100)}
        with pytest.raises(ValueError, match="other sequences or from another teacher: its tokens is"):
            pruner_of(tokenizer, tokens).recover(
                {name: values.tolist() for name, values in answers.items()},
                arguments(tmp_path, **options),
                teacher=dense_model,
            )
        with pytest.raises(ValueError, match="its top_k is 64, this one's is 3"):
            pruner_of(tokenizer, tokens).recover(
                {"input_ids": tokens}, arguments(tmp_path, **options, teacher_top_k=3), teacher=dense_model
            )
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        with pytest.raises(ValueError, match="holds no predictions of a teacher"):
            pruner_of(tokenizer, tokens).recover(
                {"input_ids": tokens},
                arguments(tmp_path, **options | {"teacher_cache": str(tmp_path / "other")}),
                teacher=dense_model,
            )


def test_what_opened_the_model_opens_its_teacher_and_the_config_is_left_as_it_was(
    dense_model, tokenizer, tokens, tmp_path, monkeypatch
):
    dense_model.save_pretrained(tmp_path / "dense")
    pruner_of(tokenizer, tokens).save_pretrained(tmp_path / "pruned")
    pruner = FwdPruner.from_pretrained(tmp_path / "pruned", token="hf_x", trust_remote_code=True)
    opened = []

    def loading(name, **options):
        opened.append((name, options.get("token"), options.get("trust_remote_code")))
        return load_causal_lm(name, **options)

    monkeypatch.setattr("optimum_fwdprune.recovery.teachers.load_causal_lm", loading)
    pruner.recover(
        {"input_ids": tokens}, arguments(tmp_path, mode="distill", max_steps=1, teacher=str(tmp_path / "dense"))
    )
    # Once without its weights, to check it before data is read.
    assert opened == [(str(tmp_path / "dense"), "hf_x", True)] * 2
    # The Trainer switches the cache off.
    assert pruner.model.config.use_cache is True


def test_sizes_on_disk_are_those_of_the_dtype_that_is_saved(tokenizer, tokens, tmp_path):
    pruner = pruner_of(tokenizer, tokens)
    pruner.model.to(torch.bfloat16)
    pruner.save_pretrained(tmp_path / "half")
    report = json.loads((tmp_path / "half" / OUTCOME_NAME).read_text())["report"]
    assert report["bytes_after"] == 2 * report["parameters_after"] and report["bytes_before"] > report["bytes_after"]


@pytest.mark.parametrize("mode", ["lora", "full", "distill"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(mode, dense_model, tokenizer, tokens, tmp_path):
    teacher = dense_model if mode == "distill" else None
    options = {"mode": mode, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lora_dropout": 0.0}
    whole = pruner_of(tokenizer, tokens)
    expected = whole.recover(TEXTS, arguments(tmp_path, **options), teacher=teacher)
    resumed = pruner_of(tokenizer, tokens)
    checkpoint = str(tmp_path / "training" / "checkpoint-3")
    found = resumed.recover(TEXTS, arguments(tmp_path, **options, resume_from_checkpoint=checkpoint), teacher=teacher)

    assert resumed.trainer.state.global_step == 6
    for name, value in expected.state_dict().items():
        assert torch.allclose(value, found.state_dict()[name], atol=1e-6), name


def test_the_last_checkpoint_is_found_by_itself(tokenizer, tokens, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    pruner_of(tokenizer, tokens).recover(TEXTS, arguments(tmp_path, max_steps=4, **options))
    # As a run leaves it that is killed while it writes a checkpoint.
    for number, state in ((8, ""), (9, '{"global_step": 9')):
        (tmp_path / "training" / f"checkpoint-{number}").mkdir()
        (tmp_path / "training" / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    pruner = pruner_of(tokenizer, tokens)
    pruner.recover(TEXTS, arguments(tmp_path, max_steps=5, resume_from_checkpoint="true", **options))

    steps = [each["step"] for each in pruner.trainer.state.log_history]
    assert pruner.trainer.state.global_step == 5 and steps[-1] == 5
    assert "nothing was left to train" not in caplog.text and "to instantiate a model of type" not in caplog.text
    pruner_of(tokenizer, tokens).recover(TEXTS, arguments(tmp_path, max_steps=5, resume_from_checkpoint="true"))
    assert "checkpoint-5 is the checkpoint of the last step, 5, so that nothing was left to train" in caplog.text


def test_adapters_alone_load_on_the_pruned_base_with_plain_peft(tokenizer, tokens, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    pruner = pruner_of(tokenizer, tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    trained = pruner.recover(TEXTS, arguments(tmp_path, merge_adapters=False))
    pruner.save_pretrained(tmp_path / "adapters")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")

    assert not list((tmp_path / "adapters").glob("model*.safetensors"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert torch.equal(loaded(tokens).logits, trained(tokens).logits)
    # By plain PEFT, and as evaluate, benchmark and compare load what they are given.
    for by_name in (AutoPeftModelForCausalLM.from_pretrained, load_causal_lm):
        assert torch.equal(by_name(tmp_path / "adapters")(tokens).logits, trained(tokens).logits)


def test_a_saved_pruned_model_is_recovered_after_loading(tokenizer, tokens, tmp_path):
    pruner = pruner_of(tokenizer, tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    again = FwdPruner.from_pretrained(tmp_path / "pruned")

    assert again.plan.kept == pruner.plan.kept and again.config == pruner.config
    again.recover(TEXTS, arguments(tmp_path, mode="full"))
    again.save_pretrained(tmp_path / "recovered")
    recovered = FwdPruner.from_pretrained(tmp_path / "recovered")
    assert recovered.plan.kept == pruner.plan.kept
    # Nor is how it was trained lost where it is only read and saved again.
    recovered.save_pretrained(tmp_path / "copy")
    assert FwdPruner.from_pretrained(tmp_path / "copy").recovery == again.recovery
    assert "- mode: full" in (tmp_path / "copy" / "README.md").read_text()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing_but_memory(mode, tokenizer, tokens, tmp_path):
    losses = []
    for checkpointing in (False, True):
        pruner = pruner_of(tokenizer, tokens)
        args = arguments(
            tmp_path, mode=mode, logging_steps=1, lora_dropout=0.0, activation_checkpointing=checkpointing
        )
        pruner.recover(TEXTS, args)
        losses.append([each["loss"] for each in pruner.trainer.state.log_history[:-1]])

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_held_out_text_is_evaluated_along_the_way(tokenizer, tokens, tmp_path):
    pruner = pruner_of(tokenizer, tokens)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=6)
    pruner.recover(TEXTS, args, eval_dataset=TEXTS[:6])
    found = [each["eval_loss"] for each in pruner.trainer.state.log_history if "eval_loss" in each]

    assert len(found) == 2 and math.isfinite(found[0]) and found[1] < found[0]


def test_what_is_logged_of_training_is_of_training(dense_model, tokenizer, tokens, tmp_path):
    """Evaluation along the way leaves the logged parts of the loss as they are."""
    options = {"mode": "distill", "max_steps": 4, "logging_steps": 2, "lora_dropout": 0.0}
    logged = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        pruner = pruner_of(tokenizer, tokens)
        args = arguments(tmp_path, **options, **evaluation)
        pruner.recover(TEXTS, args, teacher=dense_model, eval_dataset=["a fox and a dog " * 40])
        logged.append([each["divergence"] for each in pruner.trainer.state.log_history if "divergence" in each])

    assert len(logged[0]) == 2 and logged[0] == pytest.approx(logged[1])


def test_equal_seeds_give_equal_models(tokenizer, tokens, tmp_path):
    found = []
    for seed in (1, 1, 2):
        torch.rand(3)
        found.append(pruner_of(tokenizer, tokens).recover(TEXTS, arguments(tmp_path, seed=seed))(tokens).logits)

    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_log_goes_where_report_to_says(tokenizer, tokens, tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    class Log(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **_):
            self.seen.append(logs)

    # In the place of a service, as the Trainer looks them up.
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Log)
    pruner = pruner_of(tokenizer, tokens)
    pruner.recover(TEXTS, arguments(tmp_path, logging_steps=4, report_to="trackio"))
    assert [round(logs["loss"], 3) > 0 for logs in Log.seen if "loss" in logs] == [True] * 3


def test_hidden_states_come_nearer_to_the_teacher_s(dense_model, tokenizer, tokens, tmp_path):
    """With next to no other part in the loss, and gradient checkpointing, which runs layers twice."""

    def apart(model):
        with torch.no_grad():
            own, wanted = (each(tokens, output_hidden_states=True).hidden_states for each in (model, dense_model))
        return sum(float((a - b).square().mean() / b.square().mean()) for a, b in zip(own[1:], wanted[1:]))

    pruner = pruner_of(tokenizer, tokens)
    before = apart(pruner.model)
    options = {"mode": "distill", "hidden_weight": 100.0, "max_steps": 30, "activation_checkpointing": True}
    pruner.recover({"input_ids": tokens.repeat(8, 1)}, arguments(tmp_path, **options), teacher=dense_model)

    assert apart(pruner.model) < 0.8 * before


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mode": "lore"}, "mode must be one of lora, full, distill, block_distill; got 'lore'"),
            ({"mode": "lora", "adapters": False}, "cannot be combined with mode='lora', which trains adapters"),
            ({"mode": "full", "adapters": True}, "cannot be combined with mode='full', which trains all weights"),
            ({"fp16": True}, "fp16 overflows"),
            ({"lora_r": 0}, "lora_r must be at least 1; got 0"),
            ({"lora_dropout": 1.5}, r"lora_dropout must be in \[0, 1\]; got 1.5"),
            ({"distill_weight": -0.1, "mode": "distill"}, "distill_weight must be in"),
            ({"temperature": 0.0, "mode": "distill"}, "temperature must be above 0"),
            ({"max_length": 1}, "max_length must be at least 2"),
            ({"teacher": "someone/dense"}, "A teacher is used with mode='distill' or 'block_distill' only"),
            ({"mode": "distill", "hidden_weight": 1.0, "teacher_cache": "x"}, "which teacher_cache does not store"),
        ],
    )
    def test_arguments_out_of_range_are_named(self, changes, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **changes)

    def test_a_teacher_of_another_vocabulary_is_refused(self, tokenizer, tokens, tmp_path):
        pruner = pruner_of(tokenizer, tokens)
        other = tiny.make_model("llama_gqa_biases", vocab_size=310)
        with pytest.raises(ValueError, match="The teacher's vocabulary has 310 tokens and the student's 300"):
            pruner.recover(TEXTS, arguments(tmp_path, mode="distill"), teacher=other)

    def test_a_teacher_that_is_not_known_or_not_there(self, tokenizer, tokens, tmp_path):
        pruner = pruner_of(tokenizer, tokens)
        pruner.plan.metadata["source"] = None
        with pytest.raises(ValueError, match=r"needs the dense model; name it with teacher=\.\.\."):
            pruner.recover(TEXTS, arguments(tmp_path, mode="distill"))
        with pytest.raises(OSError, match="Cannot load the teacher nowhere"):
            pruner.recover(TEXTS, arguments(tmp_path, mode="distill", teacher="nowhere/at-all"))

    def test_adapters_of_other_shapes_are_refused(self, tokenizer, tokens, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        pruner_of(tokenizer, tokens).recover(TEXTS, arguments(tmp_path, **options))
        other = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
        other.prune(tiny.request(sparsity=0.2), tokens)
        with pytest.raises(
            ValueError, match=r"to another base: .* has the shape \(8, \d+\) there and \(8, \d+\) here"
        ):
            other.recover(TEXTS, arguments(tmp_path, resume_from_checkpoint="true"))
        full = pruner_of(tokenizer, tokens)
        full.recover(TEXTS, arguments(tmp_path, mode="full", output_dir=str(tmp_path / "full"), **options))
        with pytest.raises(ValueError, match="holds no adapters"):
            other.recover(TEXTS, arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2")))

    def test_checkpoints_that_are_not_there(self, tokenizer, tokens, tmp_path):
        pruner = pruner_of(tokenizer, tokens)
        with pytest.raises(ValueError, match="no checkpoint to resume from in"):
            pruner.recover(TEXTS, arguments(tmp_path, resume_from_checkpoint="true"))
        with pytest.raises(ValueError, match="There is no checkpoint nowhere to resume from"):
            pruner.recover(TEXTS, arguments(tmp_path, resume_from_checkpoint="nowhere"))

    def test_adapters_without_a_saved_base_are_refused(self, tokenizer, tokens, tmp_path):
        with pytest.raises(ValueError, match="the pruned model has not been saved yet"):
            pruner_of(tokenizer, tokens).recover(TEXTS, arguments(tmp_path, merge_adapters=False))
