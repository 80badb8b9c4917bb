"""What a notebook shows, in a real kernel: tables where they are looked at, text where they are printed, bars."""

import base64
import os
import re
import sys

import nbclient
import nbformat
import pytest

from optimum_fwdprune.evaluation import Evaluation
from optimum_fwdprune.evaluation.perplexity import TextLoss


CELLS = [
    """
import tiny, torch
from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.evaluation import compare

pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tiny.make_tokenizer())
dense = tiny.make_model("llama_gqa_biases")
tokens = torch.randint(0, tiny.VOCAB, (8, 16))
pruner.prune(PruningConfig(method="wanda_sp", kinds=["attention", "mlp"], sparsity=0.2), dataset=tokens)
""",
    "pruner.report",
    "print(pruner.report)",
    "pruner.plan",
    "pruner.scores",
    "pruner.dry_run(PruningConfig(method='magnitude', reconstruction='none', multiple_of=1))",
    """
models = {"dense": dense, "pruned": pruner.model}
comparison = compare(models, pruner.tokenizer, prompt_tokens=[8], new_tokens=1, repeats=1)
pruner.comparison = comparison
""",
    "comparison",
    "comparison.evaluations[-1]",
    "print(comparison)",
    "pruner.save_pretrained('pruned'); print(open('pruned/README.md').read())",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By cell: what it showed as HTML, and what it wrote to stdout and stderr."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(folder))
    return {cell.source: cell.outputs for cell in notebook.cells}


def html_of(outputs):
    return "".join(output["data"].get("text/html", "") for output in outputs if "data" in output)


def text_of(outputs, stream="stdout"):
    return "".join(output["text"] for output in outputs if output.get("name") == stream)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("pruner.report", ["Parameters", "Prunable parameters", "dense"]),
        ("comparison", ["parameters", "prefill 1 x 8, ms", "dense"]),
        ("pruner.plan", ["query heads", "MLP channels", "64"]),
        ("pruner.scores", ["lowest score", "attention", "mlp"]),
        ("comparison.evaluations[-1]", ["parameters", "prefill 1 x 8, ms", "pruned"]),
    ],
)
def test_what_is_looked_at_is_a_table(outputs, cell, words):
    shown = html_of(outputs[cell])

    assert shown.startswith("<table>") and all(word in shown for word in words), outputs[cell]


@pytest.mark.parametrize(
    ("cell", "words"),
    [("print(pruner.report)", ["Parameters", "Prunable parameters"]), ("print(comparison)", ["prefill 1 x 8, ms"])],
)
def test_what_is_printed_is_text(outputs, cell, words):
    shown = text_of(outputs[cell])

    assert all(word in shown for word in words) and html_of(outputs[cell]) == ""


def test_the_table_of_the_model_card_is_not_empty(outputs):
    card = text_of(outputs[CELLS[-1]])
    table = card.partition("## What each layer kept")[2].partition("```\n")[2].partition("\n```")[0]

    assert "MLP channels" in table and table.count(" / 64") == 3


def test_a_dry_run_is_sentences_and_a_table(outputs):
    (cell,) = [cell for cell in CELLS if "dry_run" in cell]
    shown = html_of(outputs[cell])

    assert shown.startswith("<p>The pruned model will have") and shown.count("<table>") == 1


def test_a_report_has_a_picture_of_what_was_kept(outputs):
    picture = r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]*)">'
    ((description, content),) = re.findall(picture, html_of(outputs["pruner.report"]))

    assert b"<svg" in base64.b64decode(content) and "each layer kept" in description


def test_names_are_escaped():
    evaluation = Evaluation("<script>alert(1)</script>", {"<b>": TextLoss(1.0, 10)}, [])
    shown = evaluation._repr_html_()

    assert "<script>" not in shown and "&lt;script&gt;" in shown and "perplexity, &lt;b&gt;" in shown


def test_long_stages_have_bars(outputs):
    assert "Calibrating: 100%" in text_of(outputs[CELLS[0]], "stderr")


def test_a_bar_within_a_bar_shares_its_line_and_is_removed(outputs):
    (cell,) = [cell for cell in CELLS if "compare(" in cell]
    shown = text_of(outputs[cell], "stderr")
    # What stays visible of a line is what was written last.
    left = [line.rpartition("\r")[2] for line in shown.split("\n")]

    assert "\rTiming:" in shown and "\x1b[A" not in shown
    assert len({len(bar) for bar in re.findall(r"\r(Timing[^\r\n]+)", shown)}) == 1
    assert [line.partition(":")[0] for line in left if line.startswith("Timing")] == ["Timing prompts"]
