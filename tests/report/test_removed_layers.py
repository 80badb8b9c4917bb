"""Reports, cards and pictures of models that lost layers and sublayers name them."""

import dataclasses
import re
from pathlib import Path

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.report import pictures, plan_table, report_table
from optimum_fwdprune.report.canvas import new_figure
from optimum_fwdprune.report.document import describe_checkpoint, document_of
from optimum_fwdprune.report.page import render_page


GONE = "1 of 4 layers is removed: layer 1."
WITHOUT = "The MLP of layer 3 is removed."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint without layer 1 and without the MLP of layer 3."""
    folder = tmp_path_factory.mktemp("depth") / "pruned"
    tokens = torch.randint(0, tiny.VOCAB, (8, 24), generator=torch.Generator().manual_seed(1))
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=4))
    pruner.prune(tiny.request("magnitude", kinds=["mlp"], sparsity=0.0), tokens)
    plan = pruner.plan
    kept = {
        key: [] if key in ((1, "attention"), (1, "mlp"), (3, "mlp")) else units for key, units in plan.kept.items()
    }
    again = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=4))
    again.prune(plan=dataclasses.replace(plan, kept=kept))
    again.save_pretrained(folder)
    return folder


def test_the_report_names_them(folder):
    pruner = FwdPruner.from_pretrained(folder)

    assert pruner.report.losses[:2] == [GONE, WITHOUT]
    lines = plan_table(pruner.plan).splitlines()
    assert lines[-2:] == [GONE, WITHOUT]
    assert [line.count("removed") for line in lines if re.match(r"\s+\d ", line)] == [0, 2, 0, 1]
    assert pruner.plan._repr_html_().count("removed") == 3


def test_tables_and_page_of_a_checkpoint_name_them(folder):
    document = document_of([describe_checkpoint(folder)])

    assert document["checkpoints"][0]["depth"] == [GONE, WITHOUT]
    table = report_table(document)
    assert GONE in table and WITHOUT in table
    assert [line.count("removed") for line in table.splitlines() if " / " in line] == [0, 2, 0, 1]
    page = render_page(document)
    assert f"<p>{GONE}</p>" in page and f"<p>{WITHOUT}</p>" in page and "Hatched" in page


def test_the_card_names_them(folder):
    card = Path(folder, "README.md").read_text()

    assert "Of its 4 layers, which are numbered from 0, layer 1 was removed. The MLP of layer 3 was removed." in card
    assert "The layers that were kept are numbered anew." in card
    assert "No unit was removed" not in card


def test_the_card_of_a_mixed_request_names_both_methods(tmp_path):
    tokens = torch.randint(0, tiny.VOCAB, (8, 24), generator=torch.Generator().manual_seed(1))
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=4))
    pruner.prune(tiny.request("magnitude", kinds=["layer", "mlp"], sparsity=0.4, depth_sparsity=0.25), tokens)
    pruner.save_pretrained(tmp_path / "pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()

    assert "The method `block_influence` chose the layers, and `magnitude` the rest" in card
    assert "MLP channels of other layers were removed." in card


def test_a_bar_is_hatched_where_no_unit_is_kept():
    axis = new_figure(5, 3).subplots()
    pictures.draw_kept(axis, "mlp", range(4), [8, 0, 4, 0], [8, 8, 8, 8], "MLP channels")
    hatched = [bar for bar in axis.patches if bar.get_hatch()]
    bars = [bar for bar in axis.patches if not bar.get_hatch()]

    assert [round(bar.get_x() + bar.get_width() / 2) for bar in hatched] == [1, 3]
    assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [0, 2, 0, 2]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["no MLP"]


@pytest.mark.parametrize(("kind", "panels"), [("layer", 1), ("sublayer", 2)])
def test_scores_of_layers_are_drawn(kind, panels, tokens, tmp_path, monkeypatch):
    """A bar for every layer or sublayer, hatched for those that were removed."""
    drawn = []
    draw = pictures.draw_depth_scores
    monkeypatch.setattr(pictures, "draw_depth_scores", lambda *what: (drawn.append(what[1:]), draw(*what)))
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=4))
    pruner.prune(dataset=tokens, method="block_influence", kinds=[kind], sparsity=0.25)
    pruner.save_pretrained(tmp_path / kind)
    document = document_of([describe_checkpoint(tmp_path / kind)])
    page = render_page(document)

    rows = document["checkpoints"][0]["depth_scores"]
    assert len(rows) == 4 * panels and len(drawn) == panels
    scores = {(key.layer, key.kind.removesuffix("_sublayer")): float(v) for key, v in pruner.scores.values.items()}
    assert {(row["layer"], row["kind"]): row["score"] for row in rows} == pytest.approx(scores)
    removed = sorted(rows, key=lambda row: row["score"])[:panels]
    assert [row for row in rows if row["removed"]] == sorted(removed, key=rows.index)
    assert f"Scores of {kind}s" in page and "hatch" in page.lower()
