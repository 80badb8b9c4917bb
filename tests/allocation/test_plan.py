"""Plans on disk, and plans that fit no model."""

import dataclasses
import json

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan, find_sites
from optimum_fwdprune.architectures import SiteKey, is_pruned


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


def test_sites_may_be_plain_tuples(plan):
    assert {type(key) for key in (*plan.kept, *plan.num_units)} == {SiteKey}
    assert plan.kept[0, "mlp"] == [1, 2, 3]


def test_the_name_of_a_site_survives_text():
    assert str(SiteKey(3, "mlp")) == "3.mlp"
    assert SiteKey.parse("3.mlp") == SiteKey(3, "mlp") == (3, "mlp")
    with pytest.raises(ValueError):
        SiteKey.parse("mlp.3")


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
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}',
        '{"format": 1, "kept": {"0": {"heads": [0]}}, "num_units": {}, "model_type": "llama"}',
    ],
)
def test_files_that_hold_no_plan_are_named(document, tmp_path):
    (tmp_path / "plan.json").write_text(document)
    with pytest.raises(ValueError, match=r"plan\.json is not a pruning plan: (?!\w+Error).* Pass the folder"):
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
        (lambda saved: saved.update(format=99), "its format is 99"),
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
    with pytest.raises(ValueError, match=rf"plan\.json is not a pruning plan: .*{message}"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.kept[1, "mlp"].pop(), r"Layer 1 mlp: the plan keeps \d+, and the weights next to it"),
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
        ("opt_pre_norm", {}, "for a 'llama' model, and this model is 'opt'"),
        ("llama_gqa_biases", {"num_hidden_layers": 2}, "names 6 sites and the model has 4"),
        ("llama_gqa_biases", {"intermediate_size": 60}, "has 64 units in the mlp of layer 0, and the model has 60"),
        ("llama_mha_tied", {}, "has 3 units in the attention of layer 0, and the model has 6"),
    ],
)
def test_a_plan_for_another_model_is_refused_before_anything_changes(other, changes, message, tokens):
    plan = plan_of("llama_gqa_biases", tokens, attention_unit="kv_group")
    model = tiny.make_model(other, **changes)
    before = model(tokens).logits
    with pytest.raises(ValueError, match=message):
        FwdPruner(model).prune(plan=plan)

    assert (model(tokens).logits == before).all()


def test_a_plan_that_unbalances_groups_is_refused(tokens):
    plan = plan_of("llama_gqa_biases", tokens, attention_unit="query_head")
    bad = PruningPlan({**plan.kept, (1, "attention"): [0, 1, 2]}, plan.num_units, "llama", "query_head")
    with pytest.raises(ValueError, match=r"keeps \[2, 1, 0\] query heads per KV group"):
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


def prunings(*requests):
    return [tiny.request(**{"sparsity": 0.2, "reconstruction": "none", **request}) for request in requests]


KV = {"attention_unit": "kv_group"}
COMPOSED = {
    "same units": prunings({}, {}),
    "KV groups twice": prunings({**KV, "sparsity": 0.3}, {**KV, "sparsity": 0.3}),
    "channels, then KV groups": prunings({"kinds": ["mlp"]}, KV),
    "KV groups, then channels": prunings(KV, {"kinds": ["mlp"]}),
    "three times": prunings({"kinds": ["mlp"]}, {"kinds": ["mlp"]}, {"kinds": ["attention"], "sparsity": 0.1}),
    "rounds": prunings({"rounds": 2}, {"rounds": 2, "kinds": ["mlp"]}),
}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", COMPOSED)
@torch.no_grad()
def test_the_plan_of_several_prunings_replays_on_the_dense_model(name, saved, tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    for number, request in enumerate(COMPOSED[name]):
        pruner.prune(request, tokens)
        if saved:
            pruner.save_pretrained(tmp_path / str(number))
            pruner = FwdPruner.from_pretrained(tmp_path / str(number))
    replayed = FwdPruner(tiny.make_model("llama_gqa_biases"))
    replayed.prune(plan=pruner.plan)

    assert pruner.plan.model_type == "llama"
    if saved:
        times = len(COMPOSED[name])
        card = (tmp_path / str(times - 1) / "README.md").read_text()
        assert f"The model was pruned {times} times. `fwdprune_plan.json` combines all of them" in card
    assert len(pruner.plan.metadata["earlier"]) == len(COMPOSED[name]) - 1
    assert torch.equal(replayed.model(tokens).logits, pruner.model(tokens).logits)


@torch.no_grad()
def test_heads_without_groups_compose_whatever_their_unit_is_called(tokens):
    for name in ("llama_mha_tied", "opt_pre_norm", "bloom"):
        pruner = FwdPruner(tiny.make_model(name))
        for request in prunings(KV, {"sparsity": 0.3}):
            pruner.prune(request, tokens)
        replayed = FwdPruner(tiny.make_model(name)).prune(plan=pruner.plan)
        assert torch.equal(replayed(tokens).logits, pruner.model(tokens).logits)


HEADS = {"kinds": ["attention"], "attention_sparsity": 0.34}


@pytest.mark.parametrize(
    ("requests", "units"),
    [
        (prunings({**KV, "sparsity": 0.3}, {"sparsity": 0.3}), "'kv_group' before and of 'query_head' now"),
        # What is left of a group of two heads after the first of them goes as a group.
        (prunings(HEADS, HEADS), "'query_head' before and of 'kv_group' now"),
    ],
)
@torch.no_grad()
def test_a_plan_that_no_plan_of_the_dense_model_expresses_is_of_the_pruned_one(
    requests, units, tokens, tmp_path, caplog
):
    first, second = requests
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(first, tokens)
    earlier = pruner.plan
    with caplog.at_level("WARNING", logger="optimum_fwdprune"):
        pruner.prune(second, tokens)
    pruner.save_pretrained(tmp_path / "twice")
    again = FwdPruner(tiny.make_model("llama_gqa_biases"))

    assert caplog.text.count("applies only to the pruned model") == 1 and units in caplog.text
    with pytest.raises(ValueError, match=r"a 'pruned_llama' model, and this .* 'llama'.*replay the plan of that"):
        again.prune(plan=PruningPlan.load(tmp_path / "twice"))
    again.prune(plan=earlier)
    again.prune(plan=PruningPlan.load(tmp_path / "twice"))
    assert torch.equal(again.model(tokens).logits, pruner.model(tokens).logits)


@pytest.mark.parametrize("is_known", [True, False])
def test_only_the_plan_of_the_model_that_was_assigned_is_composed(is_known, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(prunings({})[0], tokens)
    other = FwdPruner(tiny.make_model("llama_gqa_biases"))
    other.prune(prunings({"sparsity": 0.4})[0], tokens)
    if not is_known:
        del other.model.pruning_record
    pruner.model = other.model
    pruner.prune(prunings({"kinds": ["mlp"]})[0], tokens)

    assert pruner.plan.model_type == ("llama" if is_known else "pruned_llama")
    assert [each["requested_sparsity"] for each in pruner.plan.metadata.get("earlier", [])] == [0.4] * is_known


@pytest.mark.parametrize("reconstruction", ["least_squares", "bias"])
@torch.no_grad()
def test_a_replay_records_what_it_did_and_how_to_have_what_it_did_not(reconstruction, tokens, tmp_path, caplog):
    original = FwdPruner(tiny.make_model("llama_gqa_biases"))
    original.prune(tiny.request(sparsity=0.3, reconstruction=reconstruction), tokens)
    original.save_pretrained(tmp_path / "original")
    plan = PruningPlan.load(tmp_path / "original")
    plain = FwdPruner(tiny.make_model("llama_gqa_biases"))
    with caplog.at_level("WARNING", logger="optimum_fwdprune"):
        plain.prune(plan=plan)
    plain.save_pretrained(tmp_path / "plain")

    assert f"Pass reconstruction='{reconstruction}' with the same calibration data (tokens)" in caplog.text
    assert "reconstructed" not in plain.plan.metadata and plain.plan.metadata["reconstruction"] == "none"
    words = (tmp_path / "plain" / "README.md").read_text()
    assert "The weights that were kept are equal to those of the dense model." in words and "refitted" not in words
    caplog.clear()
    with caplog.at_level("WARNING", logger="optimum_fwdprune"):
        refitted = FwdPruner(tiny.make_model("llama_gqa_biases"))
        refitted.prune(dataset=tokens, plan=plan, reconstruction=reconstruction)
    assert "a plan holds no weights" not in caplog.text
    assert refitted.plan.metadata["reconstruction"] == reconstruction
    assert refitted.plan.metadata.get("reconstructed") == original.plan.metadata.get("reconstructed")
    assert torch.equal(refitted.model(tokens).logits, original.model(tokens).logits)
    assert not torch.equal(plain.model(tokens).logits, original.model(tokens).logits)


@pytest.mark.parametrize(
    "fields", [{"sparsity": 0.5}, {"scope": "global"}, {"kinds": ["mlp"]}, {"method": "flap"}], ids=str
)
def test_options_that_a_plan_decides_are_refused(fields):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(sparsity=0.4, method="magnitude", reconstruction="none", inplace=False)
    with pytest.raises(
        ValueError, match=f"The plan determines which units are kept, so {next(iter(fields))}=.* would"
    ):
        pruner.prune(plan=pruner.plan, **fields)


def test_a_replay_records_the_options_that_the_plan_leaves_open(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(sparsity=0.4, method="magnitude", reconstruction="none", attention_unit="kv_group")
    plan = pruner.plan
    replayed = FwdPruner(tiny.make_model("llama_gqa_biases"))
    replayed.prune(PruningConfig(method="flap", sparsity=0.7, kinds=["mlp"], reconstruction="bias"), tokens, plan=plan)

    left = {"reconstruction": "bias", "attention_unit": "kv_group", "n_samples": len(tokens)}
    assert replayed.config == PruningConfig(**left)
    with pytest.raises(ValueError, match=r"is for the dense model and includes all prunings: replay it on that"):
        replayed.prune(plan=plan)


def test_names_of_files_in_the_place_of_plans_scores_and_arguments_are_refused(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    with pytest.raises(
        TypeError, match=r"plan must be a PruningPlan; got a str. PruningPlan.load\(file\) reads a file"
    ):
        pruner.prune(plan="plan.json")
    with pytest.raises(TypeError, match="scores must be a Scores; got a dict"):
        pruner.prune(scores={})
    pruner.prune(method="magnitude", reconstruction="none")
    with pytest.raises(TypeError, match=r"args must be RecoveryArguments.*got a dict"):
        pruner.recover(tokens, {"max_steps": 1})


def test_a_plan_of_uneven_layers_is_no_stock_layout(tokens):
    pruner = FwdPruner(tiny.make_model("llama_mqa"))
    pruner.prune(tiny.request(sparsity=0.3, scope="global", reconstruction="none"), tokens)
    again = FwdPruner(tiny.make_model("llama_mqa"))
    with pytest.raises(ValueError, match="A stock checkpoint has layers of one size"):
        again.prune(PruningConfig(layout="stock", reconstruction="none"), plan=pruner.plan)
    assert not is_pruned(again.model.config)


def test_scores_of_a_deeper_model_are_refused(tokens):
    scores = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=4)).score(tiny.request(), tokens)
    with pytest.raises(ValueError, match="made for another model: they have 8 sites, and this model has 6"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(tiny.request(), scores=scores)
