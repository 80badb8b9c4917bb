"""Checkpoints are whole or absent, and never overwrite what they should not."""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from huggingface_hub import CommitInfo
from safetensors.torch import save_file

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan, Scores
from optimum_fwdprune.checkpoint.hub import check_upload
from optimum_fwdprune.export import export_gguf, export_stock
from optimum_fwdprune.files import folder_moved_into_place, write_text_atomically
from optimum_fwdprune.words import public_name


@pytest.fixture
def pruner(tokens, tokenizer):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.prune(tiny.request(method="flap", sparsity=0.3), tokens)
    return pruner


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_checkpoint_holds_all_that_is_promised(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "out")
    folder = tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())

    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "pruned_llama.py",
        "layout.py",
        "per_layer.py",
        "fwdprune_config.json",
        "fwdprune_plan.json",
        "fwdprune",
    }
    # Servers read all of these as weights.
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert config["model_type"] == "pruned_llama" and len(config["per_layer_config"]) == 3
    assert PruningPlan.load(folder).kept == pruner.plan.kept
    assert PruningConfig.from_pretrained(folder) == pruner.config
    assert type(transformers.AutoTokenizer.from_pretrained(folder)).__name__ == type(pruner.tokenizer).__name__
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_path_of_this_machine_gets_into_a_checkpoint(tokens, tokenizer, tmp_path):
    source = tmp_path / "secret_home" / "model"
    tiny.make_model("llama_gqa_biases").save_pretrained(source)
    tokenizer.save_pretrained(source)
    pruner = FwdPruner.from_pretrained(source)
    pruner.prune(None, tokens)
    pruner.save_pretrained(tmp_path / "out")

    assert pruner.plan.metadata["source"] == "model"
    assert not [name for name, content in contents(tmp_path / "out").items() if b"secret_home" in content]


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("someone/dense", "someone/dense"),
        ("gpt2", "gpt2"),
        ("/home/somebody/gone/dense", "dense"),
        ("./gone/dense", "dense"),
        ("~/dense", "dense"),
        ("models/of/somebody/dense", "dense"),
    ],
)
def test_folders_that_are_gone_are_no_repositories(name, public):
    assert public_name(name) == public


def test_saved_scores_serve_another_budget_without_calibrating_again(pruner, tokens, tmp_path, monkeypatch):
    pruner.save_pretrained(tmp_path / "out")
    scores = Scores.load(tmp_path / "out")
    monkeypatch.setattr(
        "optimum_fwdprune.planning.calibration_text.load_calibration", lambda *_: pytest.fail("calibrated again")
    )
    config = tiny.request(method="flap", sparsity=0.5)
    reused = FwdPruner(tiny.make_model("llama_gqa_biases"))
    reused_model = reused.prune(config, scores=scores)
    monkeypatch.undo()
    fresh = FwdPruner(tiny.make_model("llama_gqa_biases"))
    fresh_model = fresh.prune(config, tokens)

    assert reused.plan.kept == fresh.plan.kept
    assert reused_model(tokens).logits.equal(fresh_model(tokens).logits)


def test_a_checkpoint_holds_no_calibration_tokens_and_their_fingerprint(pruner, tokens, tmp_path):
    """They could be decoded with the tokenizer."""
    pruner.save_pretrained(tmp_path / "out")
    rows = [row.numpy().astype(kind).tobytes() for row in tokens for kind in ("int64", "int32", "int16", "uint16")]
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert not any(row in file.read_bytes() for row in rows), file
    loaded = FwdPruner.from_pretrained(tmp_path / "out").scores

    assert loaded.calibration is None
    assert loaded.calibrated_on == {"source": "tokens", "fingerprint": pruner.scores.calibration.fingerprint}
    # For one's own use they are kept.
    pruner.scores.save(tmp_path / "scores.safetensors")
    assert torch.equal(Scores.load(tmp_path / "scores.safetensors").calibration.input_ids, tokens)
    pruner.scores.save(tmp_path / "shared.safetensors", tokens=False)
    assert Scores.load(tmp_path / "shared.safetensors").calibration is None


def test_scores_of_a_checkpoint_read_the_tokens_again_where_weights_are_refitted(pruner, tokens, tmp_path, caplog):
    pruner.save_pretrained(tmp_path / "out")
    config = {"method": "flap", "kinds": ["attention", "mlp"], "sparsity": 0.4, "reconstruction": "least_squares"}
    expected = FwdPruner(tiny.make_model("llama_gqa_biases")).prune(PruningConfig(**config), scores=pruner.scores)
    scores = Scores.load(tmp_path / "out")
    found = FwdPruner(tiny.make_model("llama_gqa_biases")).prune(PruningConfig(**config), tokens, scores=scores)

    assert torch.equal(found(tokens).logits, expected(tokens).logits)
    assert "other calibration tokens" not in caplog.text
    FwdPruner(tiny.make_model("llama_gqa_biases")).prune(PruningConfig(**config), tokens.flip(0), scores=scores)
    assert "other calibration tokens" in caplog.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, ""),
        ({"seed": 3, "n_samples": 2}, ""),
        ({"batch_size": 1}, ""),
        ({"seed": 0}, "made with seed=3, which this request uses too, instead of seed=0"),
        ({"n_samples": 4, "calibration": "builtin"}, "instead of calibration='builtin', n_samples=4"),
        ({"config": PruningConfig("flap", seed=4)}, "made with seed=3"),
        ({"dataset": torch.ones(2, 16, dtype=torch.int64)}, "dataset .* is not used"),
    ],
)
def test_the_request_says_what_reused_scores_were_made_with(asked, message, tokens, caplog):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    scores = pruner.score(dataset=tokens, method="flap", seed=3, n_samples=2, reconstruction="none")
    pruner.prune(scores=scores, **{"method": "flap", "reconstruction": "none", "dataset": tokens, **asked})

    assert (pruner.config.seed, pruner.config.n_samples, pruner.plan.metadata["seed"]) == (3, 2, 3)
    assert pruner.config.calibration is None and pruner.config.batch_size == asked.get("batch_size", 8)
    warnings = [message for message in caplog.messages if "scores" in message]
    assert len(warnings) == bool(message) and re.search(message, "".join(warnings))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama_gqa_biases", {"method": "wanda_sp"}, "method='flap', and the request has method='wanda_sp'"),
        ("llama_gqa_biases", {"method": "flap", "attention_unit": "kv_group"}, "attention_unit='query_head'"),
        ("opt_pre_norm", {"method": "flap"}, "made for a 'llama' model, and this one is 'opt'"),
        ("llama3_head_dim", {"method": "flap"}, None),
    ],
)
def test_scores_for_something_else_are_refused(name, config, message, pruner):
    config = tiny.request(**config)
    if message is None:
        model = tiny.make_model(name, num_hidden_layers=4)
        message = "made for another model: they have 6 sites, and this model has 8"
    else:
        model = tiny.make_model(name)
    with pytest.raises(ValueError, match=message):
        FwdPruner(model).prune(config, scores=pruner.scores)


@pytest.mark.parametrize("metadata", [None, {}, {"fwdprune": "{"}, {"fwdprune": "[]"}, {"fwdprune": '{"config": {}}'}])
def test_a_file_that_holds_no_scores_is_named(tmp_path, metadata):
    if metadata is None:
        (tmp_path / "scores.safetensors").write_bytes(b"no tensors")
    else:
        # Means without the number of tokens behind them.
        save_file({"mean.0.mlp": torch.zeros(3)}, tmp_path / "scores.safetensors", metadata)
    with pytest.raises(ValueError, match=r"scores\.safetensors holds no scores"):
        Scores.load(tmp_path / "scores.safetensors")


@pytest.mark.parametrize(
    "damage",
    [lambda held: held[: len(held) // 2], lambda held: held[:-10], lambda held: b"\xff" * 64, lambda held: b""],
)
def test_damaged_weights_are_named_by_their_file(damage, pruner, tmp_path):
    pruner.model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(damage(shards[1].read_bytes()))
    with pytest.raises(OSError, match=rf"{shards[1].name} is damaged or incomplete") as error:
        FwdPruner.from_pretrained(tmp_path)
    assert shards[0].name not in str(error.value) and shards[2].name not in str(error.value)


def test_saving_before_pruning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prune the model first"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).save_pretrained(tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_kept_unless_told_otherwise(pruner, tmp_path):
    (tmp_path / "out").mkdir()
    pruner.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty\. Name another folder, or pass overwrite"):
        pruner.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == {**before, Path("notes.txt"): b"mine"}

    pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_named(pruner, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        pruner.save_pretrained(tmp_path / "out", overwrite=True)


def test_a_place_where_nothing_can_be_written_is_named(pruner, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Cannot write beside .*out: "):
        pruner.save_pretrained(tmp_path / "file" / "out")


def test_a_read_only_folder_is_named(pruner, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.geteuid() == 0:
        # Root may write anywhere; this is what the others meet.
        def refused(**_):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(PermissionError, match=r"Cannot write beside .*out: Permission denied"):
        pruner.save_pretrained(tmp_path / "locked" / "out")

    assert not list((tmp_path / "locked").iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_save_leaves_nothing_and_takes_nothing(pruner, tmp_path, monkeypatch, exists):
    if exists:
        pruner.save_pretrained(tmp_path / "out")
    before = contents(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PruningPlan, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.save_pretrained(tmp_path / "out", overwrite=True)

    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * exists


def test_a_killed_save_leaves_no_half_checkpoint(tmp_path):
    """SIGKILL in the middle of writing: the folder is not there, rather than there and short of files."""
    code = f"""
import time
from optimum_fwdprune.files import folder_moved_into_place
with folder_moved_into_place({str(tmp_path / "out")!r}) as folder:
    (folder / "config.json").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert not (tmp_path / "out").exists()
    # What is left is hidden and says what it is; the next save does not mind it.
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.suffix == ".partial"
    with folder_moved_into_place(tmp_path / "out") as folder:
        (folder / "config.json").write_text("whole")
    assert (tmp_path / "out" / "config.json").read_text() == "whole"


def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    replace = os.replace

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"), folder_moved_into_place(tmp_path / "out", overwrite=True):
        pass

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_files_have_the_permissions_that_the_user_asked_for(pruner, tmp_path):
    old = os.umask(0o027)
    try:
        pruner.save_pretrained(tmp_path / "out")
    finally:
        os.umask(old)

    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    found = list((tmp_path / "out").rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()} == {0o750}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o640}


def test_a_text_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_text_atomically(path, "old")

    def failing(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")

    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def under_a_file_size_limit(limit, work):
    """Run `work` in a child whose files may not grow beyond `limit` bytes: to a writer, a disk that is full."""
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(limit, work))
    process.start()
    process.join()
    return process.exitcode


def _limited(limit, work):
    # What is printed is captured in files.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the child lives
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    work()


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("limit", [200, 3_000, 30_000])
def test_a_full_disk_is_named_and_leaves_everything_as_it_was(tmp_path, limit, low_memory):
    """Too full for a config, for code, for weights."""
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    source = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}

    def prune_and_save():
        pruner = FwdPruner.from_pretrained(tmp_path / "dense", low_memory=low_memory, offload_folder=tmp_path)
        with pytest.raises(OSError, match=r"no room for .*GB free.*free some space"):
            pruner.prune(tiny.request(method="magnitude", sparsity=0.2))
            pruner.save_pretrained(tmp_path / "pruned")

    assert under_a_file_size_limit(limit, prune_and_save) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()} == source


def test_a_checkpoint_says_what_it_was_calibrated_on_and_not_where_that_was(tokenizer, tmp_path):
    text = tmp_path / "somebody" / "my text.txt"
    text.parent.mkdir()
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.prune(tiny.request(calibration=str(text), n_samples=4, seq_len=16, sparsity=0.2))
    pruner.save_pretrained(tmp_path / "out")

    assert PruningConfig.from_pretrained(tmp_path / "out").calibration == "my text.txt"
    assert "--calibration 'my text.txt'" in (tmp_path / "out" / "README.md").read_text()
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert b"somebody" not in file.read_bytes(), file


@pytest.mark.parametrize("put", ["get_peft_model", "add_adapter"])
def test_a_model_with_adapters_inside_is_not_saved_as_a_pruned_checkpoint(pruner, tmp_path, put):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    if put == "get_peft_model":
        # Changes the model in place.
        peft.get_peft_model(pruner.model, lora)
    else:
        pruner.model.add_adapter(lora)
    for check in (pruner.check_saving, pruner.save_pretrained):
        with pytest.raises(ValueError, match=r"q_proj has an adapter, which.*merge_and_unload\(\)"):
            check(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_ones_own_are_saved_alone_where_their_base_is_saved(pruner, tmp_path, monkeypatch):
    base, lora = pruner.model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    pruner.model = peft.get_peft_model(base, lora)
    with pytest.raises(ValueError, match="the pruned model has not been saved yet"):
        pruner.save_pretrained(tmp_path / "adapters")
    pruner.model = pruner.model.unload()
    pruner.save_pretrained(tmp_path / "pruned")
    name, base.config._name_or_path = base.name_or_path, str(tmp_path / "dense")
    pruner.model = peft.get_peft_model(base, lora)
    pruner.check_saving(tmp_path / "adapters")
    pruner.save_pretrained(tmp_path / "adapters")
    card = (tmp_path / "adapters" / "README.md").read_text()

    assert "base_model: pruned" in card and "base_model:adapter:pruned" in card and str(tmp_path) not in card
    assert (base.name_or_path, base.config._name_or_path) == (name, str(tmp_path / "dense"))
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "pruned")
    peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")

    def send(_upload, folder):
        pushed.append(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
        return CommitInfo("https://huggingface.co/someone/adapters/commit/1", "", "", "1")

    pushed = []
    monkeypatch.setattr("optimum_fwdprune.checkpoint.pruned_checkpoint.check_upload", lambda *_: None)
    monkeypatch.setattr("optimum_fwdprune.checkpoint.hub.Upload.send", send)
    for _ in range(2):
        pruner.push_to_hub("someone/adapters")
    assert pushed == ["pruned", "pruned"]


def test_what_saving_would_refuse_is_known_before_the_work(pruner, tmp_path):
    pruner.check_saving(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        pruner.check_saving(tmp_path / "out")
    pruner.check_saving(tmp_path / "out", overwrite=True)
    pruner.model.config.temperature = 0.5
    with pytest.raises(ValueError, match=r"config cannot be saved.*temperature.*Correct model\.config"):
        pruner.check_saving(tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("suppress_tokens", {1, 2}, r"suppress_tokens=\{1, 2\}: Object of type set is not JSON"),
        ("eos_token_id", torch.tensor(2), r"eos_token_id=tensor\(2\): Object of type Tensor is not JSON"),
        ("watermarking_config", {"a": 1}, r"watermarking_config=\{'a': 1\}: 'dict' object"),
        (None, {"max_new_tokens": 2}, r"generation_config is a dict.* must be a transformers\.GenerationConfig"),
    ],
)
def test_generation_configs_that_cannot_be_saved_are_refused_before_the_work(name, value, message, pruner, tmp_path):
    holder = pruner.model if name is None else pruner.model.generation_config
    setattr(holder, name or "generation_config", value)
    for check in (pruner.check_saving, pruner.save_pretrained):
        with pytest.raises(ValueError, match=message):
            check(tmp_path / "out")


def test_a_model_that_is_assigned_brings_what_is_known_of_it(pruner, tokens, tmp_path):
    other = FwdPruner(tiny.make_model("llama_gqa_biases"))
    other.prune(tiny.request(method="magnitude", sparsity=0.4, reconstruction="none"))
    first = pruner.model, pruner.plan
    pruner.model = other.model
    pruner.save_pretrained(tmp_path / "other")
    pruner.model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")

    assert PruningPlan.load(tmp_path / "other") == other.plan == pruner.plan
    assert PruningConfig.from_pretrained(tmp_path / "other") == other.config
    assert FwdPruner.from_pretrained(tmp_path / "other").report.masked_difference == other.report.masked_difference
    vars(first[0]).pop("pruning_record")
    pruner.model = first[0]
    assert (pruner.plan, pruner.scores, pruner.report) == (None, None, None)
    pruner.save_pretrained(tmp_path / "unknown")
    assert not (tmp_path / "unknown" / "fwdprune_plan.json").exists()


@pytest.mark.parametrize(("model", "message"), [("pn", "'pn' is a name"), (None, "got a NoneType")])
def test_what_is_no_model_is_not_assigned(model, message, pruner):
    known = pruner.model
    with pytest.raises(ValueError, match=message):
        pruner.model = model
    assert pruner.model is known


def test_what_is_no_path_is_named(pruner, tmp_path):
    of_paths = [pruner.save_pretrained, pruner.check_saving, pruner.plan.save, pruner.scores.save, pruner.report.save]
    of_paths += [pruner.config.save_pretrained, PruningPlan.load, Scores.load, PruningConfig.from_pretrained]
    of_paths += [partial(export_stock, pruner.model, None), partial(export_gguf, pruner.model, pruner.tokenizer)]
    for function in of_paths:
        with pytest.raises(TypeError, match=r"must be a str or a Path; got 5 \(int\)"):
            function(5)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"):
        pruner.scores.save(tmp_path)
    for option in ({"max_shard_size": None}, {"name": 5}):
        with pytest.raises(TypeError, match=rf"{next(iter(option))} cannot be .*; leave it out"):
            pruner.save_pretrained(tmp_path / "out", **option)
    for export in (export_stock, export_gguf):
        with pytest.raises(TypeError, match=r"model must be a transformers model in memory.*got a FwdPruner"):
            export(pruner, pruner.tokenizer, tmp_path / "out")


def test_what_an_upload_would_refuse_is_known_before_the_work(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("optimum_fwdprune.checkpoint.hub.get_token", lambda: None)
    check_upload("someone/model", token="hf_x")
    with pytest.raises(ValueError, match="'/tmp/out' is no valid name of a repository"):
        check_upload("/tmp/out", token="hf_x")
    with pytest.raises(OSError, match=r"no access token\. Log in with `hf auth login`"):
        check_upload("someone/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        check_upload("someone/model", token="hf_x")


def test_the_folder_of_the_dense_model_may_be_gone_when_the_pruned_one_is_saved(tokenizer, tmp_path):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "LICENSE").write_text("Be kind.\n")
    pruner = FwdPruner.from_pretrained(tmp_path / "dense")
    shutil.rmtree(tmp_path / "dense")
    pruner.tokenizer = tokenizer
    pruner.prune(method="magnitude", kinds=["mlp"], reconstruction="none", sparsity=0.3)
    pruner.save_pretrained(tmp_path / "out")

    assert (tmp_path / "out" / "LICENSE").read_text() == "Be kind.\n"
    assert pruner.plan.metadata["source"] == "dense"
