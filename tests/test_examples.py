"""Every script in examples/ runs on tiny models and says what it promises; the notebook runs and draws."""

import copy
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import hub_server
import nbclient
import nbformat
import pytest
import tiny
import transformers
from stand_ins import wikitext

from optimum_fwdprune import FwdPruner, PruningPlan


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """Run a script with these arguments in this process; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_scripts_are_short_and_all_of_them_are_run():
    scripts = {file.name for file in EXAMPLES.glob("*.py")}

    for name in scripts:
        assert len((EXAMPLES / name).read_text().splitlines()) < 80, name
        assert f'"{name}"' in Path(__file__).read_text(), f"no test runs {name}"


def test_the_quickstart_compares_three_models(run, tokenizer, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", max_position_embeddings=512), tokenizer)
    dense = pruner.model.num_parameters()
    # The real model takes minutes; `make quickstart` runs it.
    monkeypatch.setattr(FwdPruner, "from_pretrained", lambda *_args, **_options: pruner)
    out = run("quickstart.py", "--output", "quick", "--windows", 8, "--steps", 2)

    rows = {row[0]: row[1].split() for row in re.findall(r"^  (.+?)  +(\S.*?) *$", out, re.MULTILINE)}
    pruned = f"{pruner.model.num_parameters():,}"
    assert rows["parameters"] == [f"{dense:,}", pruned, pruned] and pruner.model.num_parameters() < 0.95 * dense
    assert len(set(rows["perplexity, documentation"])) == 3
    assert all(out.count(f"\n  {name:<10} ") == 2 for name in ("dense", "pruned", "recovered"))
    assert Path("quick/config.json").is_file() and "quick/report.html is a page" in out
    assert Path("quick/report.html").read_text().count("<svg") >= 1


def test_methods_are_compared(run):
    out = run("compare_methods.py", "--tokens", 512)

    perplexities = {method: float(value) for method, value in re.findall(r"(\w+)\W+([\d.]+)\s", out)}
    assert perplexities.keys() >= {"dense", "wanda_sp", "flap", "magnitude", "random"}


def test_policy_gradient_draws_its_history(run):
    out = run("policy_gradient_history.py", "learned")

    assert "expected loss" in out and Path("learned/history.svg").read_text().count("<svg") == 1
    assert PruningPlan.load("learned").metadata["scoring"]["steps"] == 3


@pytest.mark.parametrize(
    ("name", "arguments"), [("recover_lora.py", ["recovered"]), ("recover_distill.py", ["{pruned}", "recovered"])]
)
def test_recovered_models_are_plain_pruned_ones_that_were_trained(run, checkpoints, name, arguments):
    if name == "recover_distill.py":
        arguments = [*(argument.format(pruned=checkpoints / "pruned") for argument in arguments), "--teacher", "MODEL"]
    out = run(name, *arguments)

    assert re.search(r"[Ll]oss: \d+\.\d+", out)
    assert type(FwdPruner.from_pretrained("recovered").model).__name__ == "PrunedLlamaForCausalLM"


def test_llama_cpp_answers(run, checkpoints):
    out = run("export_and_chat.py", checkpoints / "pruned", "pruned.gguf", "the quick brown", "--tokens", 4)

    assert re.search(r"pruned\.gguf: \d+\.\d MB\n> the quick brown\n.", out)


def test_a_criterion_of_ones_own_prunes(run):
    out = run("your_own_criterion.py", "pruned")

    assert re.search(r"Prunable parameters .* -\d+\.\d%", out)
    assert json.loads(Path("pruned/fwdprune_config.json").read_text())["method"] == "active"


def test_an_architecture_of_ones_own_prunes_and_loads(run, tokenizer):
    config = transformers.VaultGemmaConfig(**{**tiny._LLAMA_SIZES, "max_position_embeddings": 512})
    transformers.VaultGemmaForCausalLM(config).save_pretrained("vaultgemma")
    tokenizer.save_pretrained("vaultgemma")
    out = run("your_own_architecture.py", "vaultgemma", "pruned")

    assert "PrunedVaultGemmaForCausalLM loads." in out
    assert Path("pruned/your_own_architecture.py").exists()


def test_what_is_pushed_loads_from_the_hub(checkpoints, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(row["text"] for row in wikitext()) * 12)
    command = [sys.executable, str(EXAMPLES / "prune_and_push.py"), "me/tiny", "--model", str(checkpoints / "dense")]
    with hub_server.running() as hub:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run([*command, "--calibration", text], env=environment, capture_output=True, text=True)

        assert done.returncode == 0, done.stderr[-2000:]
        assert f"Pushed: {hub.url}/me/tiny" in done.stdout
        assert {"model.safetensors", "README.md", "fwdprune_plan.json"} <= hub.files["me/tiny"].keys()
        assert b"Python's documentation" in hub.files["me/tiny"]["README.md"] and hub.private == {"me/tiny"}


def test_the_notebook_of_the_whole_path_ends_in_a_model_that_answers(checkpoints, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(row["text"] for row in wikitext()) * 4)
    for name, value in {"MODEL": checkpoints / "dense", "TEXT": text, "WINDOWS": 8, "STEPS": 2}.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(EXAMPLES / "whole_path.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    shown = {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}

    def html_of(line):
        return "".join(output["data"].get("text/html", "") for output in shown[line] if "data" in output)

    dry_run = html_of("FwdPruner.from_pretrained(MODEL, with_weights=False).dry_run(**request)")
    assert "The pruned model will have" in dry_run and "MLP channels" in dry_run
    assert "Prunable parameters" in html_of("pruner.report") and "data:image/svg+xml" in html_of("pruner.report")
    assert all(name in html_of("pruner.comparison") for name in ("dense", "pruned", "recovered", "perplexity, text"))
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report.json").is_file()
    card = (tmp_path / "recovered" / "README.md").read_text()
    assert "optimum-cli fwdprune recover PRUNED OUTPUT --dataset text.txt --mode distill" in card
    (answer,) = [output["text"] for output in notebook.cells[-1].outputs if output.get("name") == "stdout"]
    assert answer.strip()


def test_the_notebook_runs_and_ends_in_pictures(checkpoints, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(row["text"] for row in wikitext()))
    for name, value in {"MODEL": checkpoints / "dense", "CALIBRATION": text, "WINDOWS": 8}.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(EXAMPLES / "look_inside.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))

    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
