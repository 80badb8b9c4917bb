"""`optimum-cli fwdprune report`, as a user runs it."""

import json

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import Comparison, Evaluation, TextLoss


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A dense checkpoint, two that were pruned, what was measured of them, and a text."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.make_model("llama_gqa_biases").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    tokens = torch.randint(0, tiny.VOCAB, (16, 24), generator=torch.Generator().manual_seed(1))
    for name, sparsity in (("pruned-20", 0.2), ("pruned-40", 0.4)):
        pruner = FwdPruner.from_pretrained(folder / "dense")
        pruner.prune(tiny.request(sparsity=sparsity), tokens)
        pruner.save_pretrained(folder / name)
    names = ("dense", "pruned-20", "pruned-40")
    losses = [{"text": TextLoss(100.0 * place, 50)} for place in (1, 2, 3)]
    Comparison([Evaluation(*each, []) for each in zip(names, losses)]).save(folder / "table.json")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return folder


@pytest.fixture
def report(cli, monkeypatch, folder):
    """Run `report` in this process, in the folder; returns `(exit code, stdout, stderr)`."""
    monkeypatch.chdir(folder)
    return lambda *arguments: cli("report", *arguments)


def test_without_files_it_is_a_table(report):
    code, out, err = report("pruned-20")

    assert code == 0, err
    assert "1 pruned-20: dense pruned by wanda_sp" in out and "prunable parameters" in out
    assert "Perplexity and speed were not measured. --dense MODEL --text FILE measures them" in out


def test_a_page_and_its_figures_are_written_side_by_side(report, tmp_path):
    page, other = tmp_path / "deep" / "report.html", tmp_path / "other.json"
    code, out, err = report("pruned-20", "pruned-40", "--compare", "table.json", "--html", page, "--output", other)
    figures = json.loads(page.with_suffix(".json").read_text())

    assert code == 0, err
    assert f"Written to {page}" in out and f"Figures written to {other}" in out
    assert json.loads(other.read_text()) == figures
    assert [each["name"] for each in figures["checkpoints"]] == ["pruned-20", "pruned-40"]
    for checkpoint, place in zip(figures["checkpoints"], (2, 3)):
        measured = checkpoint["measured"]
        assert measured["dense"]["figures"] == {"perplexity, text": pytest.approx(torch.tensor(2.0).exp().item())}
        assert measured["pruned"]["figures"]["perplexity, text"] == pytest.approx(
            torch.tensor(2.0 * place).exp().item()
        )
    assert page.read_text().startswith("<!doctype html>") and "Quality against size" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "report.json"}


def test_it_measures_where_it_is_told_to(report, tmp_path):
    short = ["--prompt_tokens", 16, "--new_tokens", 2, "--repeats", 1, "--max_length", 32]
    code, out, err = report(
        "pruned-40", "--dense", "dense", "--text", "text.txt", *short, "--output", tmp_path / "r.json"
    )
    (found,) = json.loads((tmp_path / "r.json").read_text())["checkpoints"]
    figures = found["measured"]["pruned"]["figures"]

    assert code == 0, err
    assert "perplexity, text.txt" in out and "prefill 1 x 16, against dense" in out
    assert found["measured"]["dense"]["name"] == "dense"
    assert figures["parameters"] == found["sizes"]["parameters"]["after"]
    assert figures["perplexity, text.txt"] > 1 and figures["prefill 1 x 16, times as fast"] > 0


def test_without_a_dense_model_nothing_is_compared(report, tmp_path):
    """The first checkpoint is not what the second was before."""
    options = ["--text", "text.txt", "--max_length", "32", "--output", tmp_path / "r.json"]
    options += ["--prompt_tokens", 16, "--new_tokens", 2, "--repeats", 1]
    code, _, err = report("pruned-20", "pruned-40", *options)
    assert code == 0, err
    for found in json.loads((tmp_path / "r.json").read_text())["checkpoints"]:
        assert found["measured"]["dense"] is None
        assert found["measured"]["pruned"]["figures"]["perplexity, text.txt"] > 1


def test_a_checkpoint_that_the_table_leaves_out_is_not_measured(report, folder, tmp_path):
    comparison = Comparison.load(folder / "table.json")
    Comparison(comparison.evaluations[:2]).save(tmp_path / "table.json")
    code, out, _ = report("pruned-20", folder / "pruned-40", "--compare", tmp_path / "table.json")

    assert code == 0
    (line,) = (line for line in out.splitlines() if line.strip().startswith("2 pruned-40  "))
    assert "not measured" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "dense has no fwdprune_plan.json: it is dense, or was pruned with another tool."),
        (["table.json"], "table.json is a file; name the folder of a pruned checkpoint"),
        (["nowhere"], "nowhere"),
        (["."], "has no config.json"),
        (["pruned-20", "--html", "report.pdf"], "report.pdf must end in .html."),
        (["pruned-20", "--output", "table.json"], "table.json exists. Name another file, or pass --overwrite"),
        (["pruned-20", "--html", "text.txt/report.html"], "Cannot write beside"),
        (["pruned-20", "--output", "dense"], "is a folder; name a file."),
        (
            ["pruned-20", "--html", "x.html", "--output", "x.json"],
            "--html x.html writes x.json too, with the same figures",
        ),
        (["pruned-20", "--compare", "text.txt"], "text.txt holds no comparison; `optimum-cli fwdprune compare"),
        (["pruned-20", "--compare", "dense/config.json"], "holds no comparison"),
        (["pruned-20", "--compare", "missing.json"], "missing.json"),
        (["pruned-20", "--compare", "table.json", "--text", "text.txt"], "--compare reads earlier measurements"),
    ],
)
def test_a_users_error_is_one_readable_line(report, folder, arguments, message):
    before = sorted(path.name for path in folder.iterdir())
    code, _, err = report(*arguments)

    assert code == 1 and message in " ".join(err.split()) and "Traceback" not in err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_table_of_other_models_is_refused(report, folder, tmp_path):
    Comparison([Evaluation("this", {}, []), Evaluation("that", {}, [])]).save(tmp_path / "table.json")
    code, _, err = report("pruned-20", "--compare", tmp_path / "table.json")

    assert code == 1 and "has figures of this, that, but of none of these checkpoints: pruned-20." in err


def test_files_that_are_there_stop_it_before_anything_is_measured(report, folder, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("mine")
    monkeypatch.setattr("optimum_fwdprune.commands.report.compare_models", lambda *_: pytest.fail("measured"))
    code, _, err = report("pruned-20", "--dense", "dense", "--html", tmp_path / "report.html")

    assert code == 1 and "report.html exists" in err
    assert (tmp_path / "report.html").read_text() == "mine"
    assert report("pruned-20", "--html", tmp_path / "report.html", "--overwrite")[0] == 0
