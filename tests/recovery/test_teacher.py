"""The teacher is the model that was pruned, wherever it was, and no other model of its name."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from optimum_fwdprune import FwdPruner, RecoveryArguments
from optimum_fwdprune.loading import origin as origins
from optimum_fwdprune.loading.origin import Origin, fingerprint_of
from optimum_fwdprune.recovery import teachers


CUT = {"method": "magnitude", "kinds": ["attention", "mlp"], "reconstruction": "none", "sparsity": 0.4}


@pytest.fixture(autouse=True)
def remembered(monkeypatch, tmp_path):
    """Other tests prune the same weights in other folders."""
    monkeypatch.setattr(origins, "REMEMBERED", str(tmp_path / "remembered"))


@pytest.fixture
def opened(monkeypatch):
    """What teachers were loaded from, and with which revision."""
    names = []

    def loading(source, **placed):
        # The first load, to check the teacher, leaves out its weights.
        if placed["device_map"] != "meta":
            names.append((source.name, source.access.get("revision")))
        return tiny.make_model("llama_gqa_biases")

    monkeypatch.setattr(teachers, "_loaded", loading)
    monkeypatch.setattr(teachers, "read_config", lambda *_, **__: tiny.make_config("llama_gqa_biases"))
    return names


@pytest.fixture
def home(tmp_path):
    """A dense model in a folder, and the same pruned in another."""
    base = tmp_path / "somebody" / "dense"
    tiny.make_model("llama_gqa_biases").save_pretrained(base)
    pruner = FwdPruner.from_pretrained(base)
    pruner.prune(**CUT)
    pruner.save_pretrained(tmp_path / "pruned")
    return tmp_path


def distill(folder, tmp_path, tokens, taught_by=None, **changes):
    values = {"output_dir": str(tmp_path / "training"), "mode": "distill", "max_steps": 1, "use_cpu": True}
    args = RecoveryArguments(**{**values, "save_strategy": "no", **changes})
    pruner = FwdPruner.from_pretrained(folder) if not isinstance(folder, FwdPruner) else folder
    pruner.recover({"input_ids": tokens}, args, teacher=taught_by)


def another_model(folder):
    tiny.make_model("llama_gqa_biases", seed=7).save_pretrained(folder)


def test_a_local_base_is_found_from_another_folder(home, tokens, tmp_path, opened, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # Its name, with other weights.
    another_model("dense")
    distill(home / "pruned", tmp_path, tokens)

    assert opened == [(str(home / "somebody" / "dense"), None)]


def test_what_is_saved_names_no_path(home):
    metadata = json.loads((home / "pruned" / "fwdprune_plan.json").read_text())["metadata"]
    assert metadata["source"] == "dense" and len(metadata["source_fingerprint"]) == 32
    for file in (path for path in (home / "pruned").rglob("*") if path.is_file()):
        assert b"somebody" not in file.read_bytes(), file


def test_a_model_in_memory_is_known_by_the_folder_that_it_was_loaded_from(home, tokens, tmp_path, opened):
    from transformers import AutoModelForCausalLM

    pruner = FwdPruner(AutoModelForCausalLM.from_pretrained(home / "somebody" / "dense"))
    pruner.prune(**CUT)
    distill(pruner, tmp_path, tokens)

    assert opened == [(str(home / "somebody" / "dense"), None)]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_base_that_is_gone_or_replaced_is_refused_before_any_data_is_read(home, tokens, tmp_path, opened, replaced):
    shutil.rmtree(home / "somebody" / "dense")
    if replaced:
        another_model(home / "somebody" / "dense")
    message = "dense holds other weights" if replaced else "its folder no longer exists"
    pruner = FwdPruner.from_pretrained(home / "pruned")
    with pytest.raises(ValueError, match=rf"{message}.*--teacher FOLDER"):
        pruner.recover(None, RecoveryArguments(output_dir=str(tmp_path / "training"), mode="distill", use_cpu=True))
    assert opened == [] and not (tmp_path / "training").exists()


def test_a_base_that_moved_beside_the_checkpoint_or_into_the_working_directory_is_found(
    home, tokens, tmp_path, opened, monkeypatch
):
    shutil.move(home / "somebody" / "dense", home / "dense")
    distill(home / "pruned", tmp_path, tokens)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.move(home / "dense", "dense")
    distill(home / "pruned", tmp_path, tokens)

    assert opened == [(str(home / "dense"), None), ("dense", None)]


def test_a_checkpoint_without_a_fingerprint_takes_no_folder_by_its_name(home, tokens, tmp_path, opened, monkeypatch):
    file = home / "pruned" / "fwdprune_plan.json"
    plan = json.loads(file.read_text())
    del plan["metadata"]["source_fingerprint"]
    file.write_text(json.dumps(plan))
    monkeypatch.chdir(home / "somebody")
    with pytest.raises(ValueError, match=r"no fingerprint of its weights.*--teacher FOLDER"):
        distill(home / "pruned", tmp_path, tokens)


def test_a_repository_is_loaded_at_the_commit_that_was_pruned(home, tokens, tmp_path, opened, monkeypatch):
    pruner = FwdPruner.from_pretrained(home / "pruned")
    commit = {"source": "someone/dense", "source_revision": "c" * 40, "source_fingerprint": "0" * 32}
    pruner.plan.metadata.update(commit)
    distill(pruner, tmp_path, tokens)
    assert opened == [("someone/dense", "c" * 40)]

    # A folder of the working directory would be loaded in its place.
    monkeypatch.chdir(tmp_path)
    another_model("someone/dense")
    pruner.plan.metadata.update(commit)
    with pytest.raises(ValueError, match="someone/dense holds other weights"):
        distill(pruner, tmp_path, tokens)


def test_a_teacher_that_is_named_needs_no_fingerprint(home, tokens, tmp_path, opened):
    shutil.rmtree(home / "somebody")
    another_model(home / "other")
    distill(home / "pruned", tmp_path, tokens, teacher=str(home / "other"))
    assert len(opened) == 1


class TestTeachersThatAreRefused:
    """Before any data is read, which is `None` here."""

    def refused(self, tmp_path, message, taught_by, error=ValueError, **changes):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(**CUT)
        values = {"output_dir": str(tmp_path / "training"), "mode": "distill", "use_cpu": True}
        teacher = taught_by(pruner) if callable(taught_by) else taught_by
        with pytest.raises(error, match=message):
            pruner.recover(None, RecoveryArguments(**values | changes), teacher=teacher)
        assert not (tmp_path / "training").exists()

    @pytest.mark.parametrize(
        ("teacher", "message"),
        [
            (lambda _: 5, "a folder or a repository of the Hub; got a int"),
            (lambda _: FwdPruner(tiny.make_model("llama_gqa_biases")), "got a FwdPruner.*its attribute 'model'"),
            (lambda pruner: pruner.model, "shares weights with the model that is trained"),
            (lambda _: tiny.make_model("llama_gqa_biases", AutoModel), "a LlamaModel, which predicts no next token"),
            (lambda _: tiny.make_model("llama_gqa_biases", num_hidden_layers=2), "teacher has 2 layers and the stud"),
            (lambda _: tiny.make_model("llama_gqa_biases", hidden_size=96), "teacher has 96 hidden features and the"),
            (
                lambda _: tiny.make_model("llama_gqa_biases", vocab_size=310),
                "vocabulary has 310 tokens and the student's 300",
            ),
            (lambda _: tiny.make_model("llama_gqa_biases", max_position_embeddings=8), "max_length=8"),
        ],
    )
    def test_in_memory(self, tmp_path, teacher, message):
        self.refused(tmp_path, message, teacher, hidden_weight=0.5)

    def test_on_disk(self, tmp_path):
        tiny.make_model("llama_gqa_biases", AutoModel).save_pretrained(tmp_path / "bare")
        self.refused(tmp_path, "lacks 1 of the parameters.*lm_head.weight, which", str(tmp_path / "bare"))
        adapted = get_peft_model(tiny.make_model("llama_gqa_biases"), LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapters")
        self.refused(tmp_path, "it holds adapters of .*pass the model", str(tmp_path / "adapters"), error=OSError)
        self.refused(tmp_path, "there is no such folder", tmp_path / "nowhere", error=OSError)
        tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
        self.refused(tmp_path, "'flux:0' is no device", str(tmp_path / "dense"), teacher_device_map="flux:0")

    def test_where_none_or_another_one_is_asked_for(self, tmp_path):
        self.refused(tmp_path, "A teacher is used with mode='distill' or 'block_distill' only", "dense", mode="lora")
        self.refused(tmp_path, "leave one of them out", "dense", teacher="other")

    def test_with_a_cache_of_something_else(self, tmp_path):
        (tmp_path / "text.txt").touch()
        for cache in ("text.txt", "text.txt/inside"):
            self.refused(tmp_path, "text.txt", None, error=OSError, teacher_cache=str(tmp_path / cache))
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "teacher.json").write_text("[1]")
        self.refused(tmp_path, "holds no predictions", None, teacher_cache=str(tmp_path / "kept"))
        (tmp_path / "kept" / "teacher.json").write_text('{"teacher": "dense", "top_k": 3, "tokens": ""}')
        self.refused(tmp_path, "its top_k is 3", "dense", teacher_cache=str(tmp_path / "kept"))
        self.refused(tmp_path, "needs the dense model", None, teacher_cache=str(tmp_path / "new" / "cache"))
        assert not (tmp_path / "new").exists()


def test_adapters_of_a_teacher_count(tokens, tmp_path):
    """A PeftModel teaches with its adapters, and its kept predictions are not those of its base."""
    base = tiny.make_model("llama_gqa_biases")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    losses = []
    for teacher in (tiny.make_model("llama_gqa_biases"), adapted):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(**CUT)
        options = {"logging_steps": 1, "teacher_cache": str(tmp_path / f"kept{len(losses)}")}
        distill(pruner, tmp_path, tokens, taught_by=teacher, **options)
        losses.append(pruner.trainer.state.log_history[0]["divergence"])

    assert losses[0] != losses[1]
    identities = [json.loads((tmp_path / f"kept{n}" / "teacher.json").read_text())["teacher"] for n in (0, 1)]
    assert identities[0] != identities[1] and "with adapters" in identities[1]


class TestFingerprint:
    def test_it_does_not_depend_on_how_weights_are_divided_into_files(self, tmp_path):
        model = tiny.make_model("llama_gqa_biases")
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
        assert fingerprint_of(tmp_path / "one", {}) == fingerprint_of(tmp_path / "many", {})

    @pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
    def test_it_depends_on_every_tensor(self, tmp_path, name):
        model = tiny.make_model("llama_gqa_biases")
        model.save_pretrained(tmp_path / "one")
        with torch.no_grad():
            model.get_parameter(name).mul_(1.01)
        model.save_pretrained(tmp_path / "two")
        assert fingerprint_of(tmp_path / "one", {}) != fingerprint_of(tmp_path / "two", {})

    @pytest.mark.parametrize("claimed", ["../../etc/passwd", "", 7, ["x"], "0" * 32])
    def test_what_a_plan_claims_is_no_path(self, claimed):
        source = Origin.of_plan({"source": "dense", "source_fingerprint": claimed})
        assert source.folders == ()


def test_a_repository_that_cannot_be_read_is_known_by_its_commit(monkeypatch):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.model.config._name_or_path = "someone/dense"
    pruner.model.config._commit_hash = "c" * 40
    access = {"token": "hf_x", "trust_remote_code": True}
    pruner._source = dataclasses.replace(pruner._source, access=access)
    pruner.prune(**CUT)

    assert (pruner.plan.metadata["source"], pruner.plan.metadata["source_revision"]) == ("someone/dense", "c" * 40)
    assert "source_fingerprint" not in pruner.plan.metadata
