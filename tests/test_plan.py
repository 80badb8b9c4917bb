"""Plans on disk, and plans that fit no model."""

import dataclasses
import json

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan, find_sites


@pytest.fixture
def plan():
    kept = {(0, "attention"): [0, 2], (0, "mlp"): [1, 2, 3], (1, "attention"): [0], (1, "mlp"): [0, 4]}
    totals = {(0, "attention"): 3, (0, "mlp"): 5, (1, "attention"): 3, (1, "mlp"): 5}
    return PruningPlan(kept, totals, "llama", "kv_group", {"method": "by hand"})


def test_a_plan_survives_the_disk(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    plan.save(tmp_path)

    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert PruningPlan.load(tmp_path) == plan


def test_units_may_be_tuples(plan):
    tuples = dataclasses.replace(plan, kept={key: tuple(units) for key, units in plan.kept.items()})

    assert tuples == plan


def test_a_site_keeps_the_units_of_a_tuple():
    site = find_sites(tiny.make_model("llama_gqa_biases"))[1]

    assert site.unit_mask((0, 3)).nonzero().flatten().tolist() == [0, 3]


def test_removed_units(plan):
    assert plan.removed((0, "attention")) == [1]
    assert plan.removed((1, "mlp")) == [1, 2, 3]


@pytest.mark.parametrize("units", [[2, 0], [0, 0], [0, 3], [-1]])
def test_units_must_be_sorted_different_and_in_range(units):
    with pytest.raises(ValueError, match=r"Layer 0 attention: kept units .* in \[0, 3\); got"):
        PruningPlan({(0, "attention"): units}, {(0, "attention"): 3}, "llama", "kv_group")


def test_kept_and_totals_name_the_same_sites():
    with pytest.raises(ValueError, match="same sites"):
        PruningPlan({(0, "attention"): [0]}, {(0, "mlp"): 3}, "llama", "kv_group")


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{}",
        "[]",
        "\x00\x01",
        '"text"',
        '{"format": 1, "kept": {"0": {"heads": [0]}}, "num_units": {}, "model_type": "llama"}',
    ],
)
def test_files_that_hold_no_plan_are_named(document, tmp_path):
    (tmp_path / "plan.json").write_text(document)
    with pytest.raises(ValueError, match=r"plan\.json is no pruning plan"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["kept"]["0"].update(mlp=[0.5, 1.5]), "units are a list of integers"),
        (lambda saved: saved["kept"]["0"].update(mlp=[False, True]), "units are a list of integers"),
        (lambda saved: saved["kept"]["0"].update(mlp=3), "units are a list of integers"),
        (lambda saved: saved["kept"]["0"].update(mlp=[-1]), r"in \[0, 64\)"),
        (lambda saved: saved["num_units"]["0"].update(mlp="many"), "units are a list of integers"),
        (lambda saved: saved["kept"].update(x=saved["kept"].pop("0")), "invalid literal"),
        (lambda saved: saved["kept"].pop("1"), "must name the same sites"),
        (lambda saved: saved.update(format=99), "format 99 is not known"),
        (lambda saved: saved.update(metadata=[1]), "metadata must be"),
        (lambda saved: saved.update(model_type=5), "model_type must be"),
        (lambda saved: saved.update(attention_unit="rows"), "attention_unit must be"),
    ],
)
def test_a_plan_edited_to_nonsense_is_named(change, message, tokens, tmp_path):
    plan_of("llama_gqa_biases", tokens).save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    change(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"plan\.json is no pruning plan: .*{message}"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.kept[1, "mlp"].pop(), r"Layer 1 mlp: the plan leaves \d+, and the weights beside it have"),
        (lambda plan: (plan.kept.pop((2, "mlp")), plan.num_units.pop((2, "mlp"))), "Layer 2 mlp: .* no such site"),
    ],
)
def test_a_plan_that_is_not_that_of_its_weights_is_refused(change, message, tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(sparsity=0.3), tokens)
    pruner.save_pretrained(tmp_path)
    plan = PruningPlan.load(tmp_path)
    change(plan)
    plan.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        FwdPruner.from_pretrained(tmp_path)


def plan_of(name, tokens, **config):
    pruner = FwdPruner(tiny.make_model(name))
    pruner.prune(tiny.request(sparsity=0.3, **config), tokens)
    return pruner.plan


@pytest.mark.parametrize(
    ("other", "changes", "message"),
    [
        ("opt_pre_norm", {}, "for a 'llama' model, this one is 'opt'"),
        ("llama_gqa_biases", {"num_hidden_layers": 2}, "names 6 sites and the model has 4"),
        ("llama_gqa_biases", {"intermediate_size": 60}, "knows 64 units in the mlp of layer 0, the model has 60"),
        ("llama_mha_tied", {}, "knows 3 units in the attention of layer 0, the model has 6"),
    ],
)
def test_a_plan_for_another_model_is_refused_before_anything_changes(other, changes, message, tokens):
    plan = plan_of("llama_gqa_biases", tokens, attention_unit="kv_group")
    model = tiny.make_model(other, **changes)
    before = model(tokens).logits
    with pytest.raises(ValueError, match=message):
        FwdPruner(model).prune(plan=plan)

    assert (model(tokens).logits == before).all()


def test_a_plan_that_empties_a_site_or_unbalances_groups_is_refused(tokens):
    plan = plan_of("llama_gqa_biases", tokens, attention_unit="query_head")
    for heads, message in (([], "keep at least one"), ([0, 1, 2], r"keeps \[2, 1, 0\] query heads per KV group")):
        bad = PruningPlan({**plan.kept, (1, "attention"): heads}, plan.num_units, "llama", "query_head")
        with pytest.raises(ValueError, match=message):
            FwdPruner(tiny.make_model("llama_gqa_biases")).prune(plan=bad)


def test_replaying_a_plan_gives_the_same_model(dense, tokens):
    pruner = FwdPruner(dense)
    config = tiny.request(sparsity=0.3, scope="global", reconstruction="none")
    expected = pruner.prune(config, tokens, inplace=False)
    replayed = FwdPruner(dense).prune(plan=pruner.plan)

    assert replayed(tokens).logits.equal(expected(tokens).logits)


def test_replaying_a_plan_reconstructs_where_the_request_says_so(tokens):
    model = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(model)
    expected = pruner.prune(tiny.request(sparsity=0.3, reconstruction="least_squares"), tokens, inplace=False)
    replayed = FwdPruner(model).prune(tiny.request(reconstruction="least_squares"), tokens, plan=pruner.plan)

    assert replayed(tokens).logits.equal(expected(tokens).logits)


def test_a_plan_records_how_it_came_about(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(method="flap", sparsity=0.25, seed=5), tokens)
    metadata = json.loads(json.dumps(pruner.plan.metadata))

    assert (metadata["method"], metadata["reconstruction"], metadata["seed"]) == ("flap", "bias", 5)
    assert metadata["requested_sparsity"] == pytest.approx(0.25, abs=0.001)
    assert metadata["calibration"] == {"source": "tokens", "fingerprint": pruner.scores.calibration.fingerprint}
    assert set(metadata["scores"]) == {f"{site.layer}.{site.kind}" for site in find_sites(pruner.model)}
    assert {"optimum_fwdprune", "transformers", "torch"} == set(metadata["versions"])


def test_plan_and_scores_together_are_refused(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    scores = pruner.score(None, tokens)
    plan = plan_of("llama_gqa_biases", tokens)
    with pytest.raises(ValueError, match="not both"):
        pruner.prune(plan=plan, scores=scores)


def test_a_replay_reconstructs_where_the_request_names_it(tokens):
    """A plan alone keeps the columns as they are; a config, a preset or the field itself refits them."""
    dense = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(dense)
    pruner.prune(sparsity=0.4, dataset=tokens, inplace=False)
    plan = pruner.plan

    def refits(*request, **fields):
        replaying = FwdPruner(dense)
        replaying.prune(*request, plan=plan, dataset=tokens, inplace=False, **fields)
        kept = torch.tensor(plan.kept[0, "mlp"])
        weight = replaying.model.model.layers[0].mlp.down_proj.weight
        return not torch.equal(weight, dense.model.layers[0].mlp.down_proj.weight[:, kept])

    assert not refits() and not refits(seed=3)
    assert refits(reconstruction="least_squares") and refits("fast") and refits(PruningConfig())
