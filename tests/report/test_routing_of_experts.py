"""Reports of mixtures show how tokens are routed before and after experts are removed."""

import pytest
import tiny_mixtures
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.report.canvas import new_figure
from optimum_fwdprune.report.document import describe, document_of
from optimum_fwdprune.report.page import render_page
from optimum_fwdprune.report.routing import draw_tokens_of_experts, routing_of
from optimum_fwdprune.report.sentences import what_became_of_the_weights


@pytest.fixture(scope="module")
def pruner():
    tokens = torch.randint(0, 300, (16, 24), generator=torch.Generator().manual_seed(1))
    pruner = FwdPruner(tiny_mixtures.make_mixture("qwen3_moe"))
    pruner.prune(None, tokens, kinds=["expert"], sparsity=0.5)
    return pruner


def test_rows_have_the_choices_that_others_take_over_and_the_tokens_of_experts(pruner):
    rows = describe("pruned", pruner._record)["routing_by_layer"]

    # Layer 0 has a dense MLP.
    assert [row["layer"] for row in rows] == [1, 2]
    counts = pruner.plan.metadata["routing"]["1.expert"]
    kept = pruner.plan.kept[(1, "expert")]
    assert rows[0]["removed"] == pytest.approx(1 - sum(counts[expert] for expert in kept) / sum(counts))
    after = pruner.plan.metadata["reconstructed"]["1.expert"]["routed"]
    # Every token has two experts before and after.
    assert sum(after) == sum(counts) == 2 * 16 * 24
    for numbers, shares in ((counts, rows[0]["before"]), (after, rows[0]["after"])):
        assert shares["most"] == pytest.approx(max(numbers) / sum(numbers) * len(numbers))
        assert shares["least"] == pytest.approx(min(numbers) / sum(numbers) * len(numbers))


def test_the_page_draws_them(pruner):
    checkpoint = describe("pruned", pruner._record)
    page = render_page(document_of([checkpoint]))

    for text in ("choices of removed experts", "tokens of an expert", "before", "after"):
        assert f">{text}</text>" in page


def test_without_a_fit_the_routing_after_pruning_is_left_out(pruner):
    rows = [{**row, "after": None} for row in routing_of(pruner.plan)]
    axis = new_figure(4, 3).subplots()
    draw_tokens_of_experts(axis, rows)

    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before"]


def test_the_card_says_that_experts_were_refitted_and_not_columns(pruner):
    sentences = list(what_became_of_the_weights(pruner._record))

    assert sentences == [
        "The output projections of the kept experts were refitted by least squares one layer after the other."
    ]
