"""What a family makes impossible is declared with its reason, and refused with it before any work."""

from pathlib import Path

import pytest
import tiny

import optimum_fwdprune.models
from optimum_fwdprune import FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.architectures import get_architecture, registered_architectures


REQUESTS_FOR_HEADS = (
    ({"kinds": ["attention"]}, "'mlp'"),
    ({"kinds": ["attention", "mlp"]}, "'mlp'"),
    ({"kinds": ["attention", "layer"], "depth_sparsity": 0.3}, "'layer'"),
    ({"attention_sparsity": 0.3}, "'mlp'"),
)


@pytest.mark.parametrize(("request_for_heads", "way_out"), REQUESTS_FOR_HEADS)
@pytest.mark.parametrize("name", tiny.FIXED_HEADS)
def test_heads_that_cannot_go_are_refused_with_the_reason_before_any_work(
    name, request_for_heads, way_out, monkeypatch
):
    dense = tiny.make_model(name)
    monkeypatch.setattr(type(dense.base_model), "forward", None)
    reason = get_architecture(dense.config).layout.attention.fixed
    with pytest.raises(ValueError, match=f"query heads, which this .* cannot lose: {reason} Use kinds=.{way_out}.[.]"):
        FwdPruner(dense).prune(method="wanda_sp", **request_for_heads)


@pytest.mark.parametrize("name", tiny.FIXED_HEADS)
def test_a_plan_that_removes_such_heads_is_refused(name):
    dense = tiny.make_model(name)
    sites = find_sites(dense, "kv_group")
    counts = {site.key: site.num_units for site in sites}
    kept = {site.key: list(range(site.num_units)) for site in sites}
    plan = PruningPlan({**kept, (1, "attention"): [0, 2]}, counts, dense.config.model_type, "kv_group")
    with pytest.raises(ValueError, match=r"KV groups of the attention of layer 1, which .* cannot lose: its query"):
        FwdPruner(dense).prune(plan=plan)


@pytest.mark.parametrize("name", tiny.FIXED_HEADS)
def test_a_budget_that_the_channels_cannot_meet_leaves_such_heads_alone(name, tokens):
    """Other models lose heads too where the budget is more than their channels can give."""
    others = FwdPruner(tiny.make_model("llama_gqa_biases"))
    others.prune(None, tokens, sparsity=0.75, reconstruction="none")
    assert any(others.plan.removed((layer, "attention")) for layer in range(3))

    pruner = FwdPruner(tiny.make_model(name))
    with pytest.raises(ValueError, match=r"the largest possible sparsity is 0\.[56]"):
        pruner.prune(None, tokens, sparsity=0.75, kinds=["mlp"], reconstruction="none")
    # Where kinds are not set, whole layers go.
    pruner.prune(None, tokens, sparsity=0.75, reconstruction="none")
    assert not any(0 < len(kept) < 6 for (_, kind), kept in pruner.plan.kept.items() if kind == "attention")


def test_every_family_says_what_it_supports():
    fixed = {
        architecture.model_type
        for architecture in registered_architectures()
        if not architecture.support["heads"].possible
    }

    assert {"olmo2", "olmo3"} <= fixed
    assert not fixed & {"llama", "gemma2", "cohere", "stablelm"}
    for architecture in registered_architectures():
        assert architecture.support.keys() == {"heads", "channels", "uneven layers", "experts"}
        assert all(support.possible or support.reason for support in architecture.support.values())


def test_a_family_takes_at_most_40_lines_on_average():
    folder = Path(optimum_fwdprune.models.__file__).parent
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in folder.glob("pruned_*.py")]

    assert sum(lines) <= 40 * len(lines)
