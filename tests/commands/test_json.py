"""`--json`: one document on stdout, with the keys that docs/reference/json.md lists, and nothing else there."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import optimum_fwdprune
from optimum_fwdprune.commands.fwdprune import FwdPruneCommand


DOCUMENTED = (Path(optimum_fwdprune.__file__).parent.parent / "docs" / "reference" / "json.md").read_text()
TEXT = ["--calibration", "builtin", "--n_samples", "4", "--seq_len", "32"]
FAST = ["--prompt_tokens", "8", "--new_tokens", "1", "--repeats", "1"]


def keys_of(title, number=0):
    """The keys in the first column of a table below a title of the page."""
    section = re.split(r"^## ", DOCUMENTED, flags=re.MULTILINE)
    (text,) = [part for part in section if part.partition("\n")[0] == title]
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    rows = tables[number].splitlines()[2:]
    return [key for row in rows for key in re.findall(r"`([^`]*)`", row.split("|")[1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dense model, a pruned one, and a text."""
    folder = tmp_path_factory.mktemp("json")
    tokenizer = tiny.make_tokenizer()
    tiny.make_model("llama_gqa_biases").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    pruner = optimum_fwdprune.FwdPruner.from_pretrained(folder / "dense")
    pruner.prune(method="magnitude", reconstruction="none", sparsity=0.3)
    pruner.save_pretrained(folder / "pruned")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return folder


@pytest.fixture
def document(cli, folder, monkeypatch):
    """Run a command with `--json`; returns its document, after checking that stdout holds nothing else."""
    monkeypatch.chdir(folder)

    def document(*words):
        code, out, err = cli(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return document


def test_every_command_that_prints_a_table_has_the_option():
    has = {info.name: info.subcommand_class.SHOWS_FIGURES for info in FwdPruneCommand.SUBCOMMANDS}

    assert [name for name, shows in has.items() if not shows] == ["recover", "export"]


def test_a_dry_run(document, folder):
    found = document("prune", "-m", "dense", "out", "--dry-run", "--sparsity", "0.3", *TEXT)

    assert list(found) == keys_of("prune --dry-run")
    assert list(found["serving_memory"]) == ["weights", "cache", "activations", "total", "batch_size", "tokens"]
    assert found["layers"][1]["mlp"]["units"] == 64 and not (folder / "out").exists()


def test_a_pruning(document, folder, tmp_path):
    found = document("prune", "-m", "dense", tmp_path / "out", "--sparsity", "0.3", *TEXT)

    assert list(found) == ["output", *(key for key in keys_of("report", 1) if key != "number")]
    assert found["output"] == str(tmp_path / "out") and found["sizes"]["prunable"]["change"] < -0.25
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_sweep(document, tmp_path):
    sweep = ["sweep", "-m", "dense", tmp_path / "sizes", "--sparsity", "0.2", "0.4", "--preset", "fast", "--no-speed"]
    found = document(*sweep, *TEXT)

    assert list(found) == keys_of("sweep")
    assert found == json.loads((tmp_path / "sizes" / "sweep.json").read_text())
    assert [row["request"]["sparsity"] for row in found["rows"]] == [0.2, 0.4]


def test_an_inspection(document, tmp_path):
    dense, pruned = document("inspect", "dense"), document("inspect", "pruned")
    transformers.BioGptConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=64).save_pretrained(
        tmp_path / "biogpt"
    )
    unknown = document("inspect", tmp_path / "biogpt")

    assert list(dense) == list(pruned) == list(unknown) == keys_of("inspect")
    assert dense["plan"] is None and [row["mlp"]["units"] for row in pruned["plan"]["layers"]] == [64] * 3
    assert {unit["unit"] for unit in dense["model"]["units"]} >= {"query heads", "MLP channels", "whole layers"}
    assert pruned["model"]["parameters"] < dense["model"]["parameters"]
    assert "declaration" in unknown["layout"] and unknown["layout"]["linears"]


def test_a_report(document):
    found = document("report", "pruned")
    (checkpoint,) = found["checkpoints"]

    assert list(found) == keys_of("report") and sorted(checkpoint) == sorted(keys_of("report", 1))


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "dense", "--text", "text.txt", "--max_length", "16"],
        ["benchmark", "dense", "pruned", *FAST],
        ["compare", "dense", "pruned", "--text", "text.txt", "--max_length", "16", *FAST],
    ],
    ids=lambda words: words[0],
)
def test_measurements(document, words):
    found = document(*words)

    assert list(found) == keys_of("evaluate, benchmark and compare")
    assert [model["name"] for model in found["models"]] == [word for word in words[1:3] if not word.startswith("-")]
    assert all(model["figures"] for model in found["models"])


def test_an_error_leaves_stdout_empty(cli, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, err = cli("evaluate", "nowhere", "--text", "text.txt", "--json")

    assert code == 1 and out == "" and "nowhere" in err.splitlines()[-1]


def test_what_a_broken_model_measures_is_text(cli, folder, monkeypatch, tmp_path):
    model = tiny.make_model("llama_gqa_biases")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tiny.make_tokenizer().save_pretrained(tmp_path / "broken")
    code, out, err = cli(
        *("evaluate", tmp_path / "broken", "--text", folder / "text.txt", "--max_length", "16", "--json")
    )

    assert code == 0, err
    assert json.loads(out)["models"][0]["figures"] == {"perplexity, text.txt": "nan"}
