"""A dry run foresees what `prune` does, refuses what `prune` refuses, and needs no weights."""

import dataclasses
import re
import shutil

import pytest
import tiny
import tiny_mixtures
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.planning import duration


TOKENS = torch.arange(96).view(4, 24) % tiny.VOCAB
# Every layer keeps what the request determines, whatever the scores are.
DECIDED = {
    "the defaults": {},
    "heads too": {"kinds": ["attention", "mlp"], "sparsity": 0.4},
    "a bias": {"reconstruction": "bias", "method": "flap", "scope": "layer"},
    "few parameters": {"target_parameters": 70_000},
    "no reconstruction": {"method": "magnitude", "reconstruction": "none", "skip_layers": [0]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.make_model("llama_gqa_biases", dtype=torch.bfloat16, mlp_bias=False).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def weightless(folder, tmp_path):
    """A pruner of a folder from which the weights are gone."""
    copied = tmp_path / "config-only"
    shutil.copytree(folder, copied)
    (copied / "model.safetensors").unlink()
    return FwdPruner.from_pretrained(copied, with_weights=False)


@pytest.mark.parametrize("name", DECIDED)
def test_the_sizes_are_those_of_the_run(name, folder, weightless):
    foreseen = weightless.dry_run(dataset=TOKENS, **DECIDED[name])
    pruner = FwdPruner.from_pretrained(folder)
    pruner.prune(dataset=TOKENS, **DECIDED[name])

    assert foreseen.sizes.parameters_after == pruner.report.parameters_after
    assert foreseen.sizes.bytes_after == pruner.report.bytes_after
    kept = {(row["layer"], kind): row[kind]["kept"] for row in foreseen.layers for kind in ("attention", "mlp")}
    assert kept == {(key.layer, key.kind): len(units) for key, units in pruner.plan.kept.items()}


def test_a_replay_is_foreseen(folder, weightless):
    pruner = FwdPruner.from_pretrained(folder)
    pruner.prune(method="random", reconstruction="none", scope="global")
    foreseen = weightless.dry_run(plan=pruner.plan)

    assert foreseen.sizes.parameters_after == pruner.report.parameters_after
    assert [row["mlp"]["kept"] for row in foreseen.layers] == [len(pruner.plan.kept[n, "mlp"]) for n in range(3)]


@pytest.mark.parametrize(
    "fields", [{"scope": "global"}, {"kinds": ["layer"], "sparsity": 0.34, "method": "random"}, {"rounds": 2}], ids=str
)
def test_what_the_scores_decide_is_left_open(fields, weightless):
    assert weightless.dry_run(dataset=TOKENS, **fields).layers is None


def test_nothing_is_changed_or_scored(folder):
    pruner = FwdPruner.from_pretrained(folder)
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    pruner.dry_run(dataset=TOKENS)

    assert pruner.scores is None and pruner.plan is None and pruner.report is None
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": 0.999},
        {"target_parameters": 10},
        {"kinds": ["expert"]},
        {"calibration": "nowhere.txt"},
        {"calibration": "builtin", "n_samples": 9_999_999},
        {"layout": "stock", "kinds": ["attention", "mlp"], "skip_layers": [0]},
        {"skip_layers": [7]},
    ],
    ids=str,
)
def test_the_errors_are_those_of_the_run(fields, folder, weightless):
    with pytest.raises((ValueError, OSError)) as of_run:
        FwdPruner.from_pretrained(folder).prune(**fields)
    with pytest.raises(type(of_run.value)) as foreseen:
        weightless.dry_run(**fields)

    assert str(foreseen.value) == str(of_run.value)


def test_damaged_weights_are_refused_as_when_they_are_read(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(OSError, match="is damaged or incomplete"):
        FwdPruner.from_pretrained(broken, with_weights=False)


def test_a_model_without_weights_is_not_pruned(weightless):
    with pytest.raises(ValueError, match="has no weights; load it with from_pretrained"):
        weightless.prune(dataset=TOKENS)


def test_text_of_the_model_itself_is_not_generated(weightless):
    assert weightless.dry_run(calibration="self", n_samples=4, seq_len=16).seconds["score"] > 0


def test_seconds_are_those_of_the_passes_that_a_request_takes(weightless, monkeypatch):
    monkeypatch.setattr(duration, "median_seconds", lambda runs, *_: [1.0] * len(runs))

    def score(**fields):
        return weightless.dry_run(dataset=TOKENS, reconstruction="none", **fields).seconds["score"]

    # Three layers, and a pass over the four windows for statistics.
    assert score() == 3 * 4
    assert score(method="taylor") == 3 * (4 + 3 * 4)
    assert score(method="mini_llm", draws=5, windows_per_draw=2) == 3 * (4 + 2 * 5 * 2)
    assert score(method="policy_gradient", steps=3, masks_per_step=4, windows_per_step=2) == 3 * (4 + 24)
    assert score(rounds=2) == 2 * 3 * 4
    assert weightless.dry_run(dataset=TOKENS, method="removal_loss", kinds=["layer"]).seconds is None


def test_a_limit_of_quality_shows_the_smallest_model(weightless):
    foreseen = weightless.dry_run(dataset=TOKENS, max_perplexity_ratio=1.2)

    assert "The run measures max_perplexity_ratio=1.2 and chooses the size by it." in str(foreseen)
    assert foreseen.sizes.parameters_after < weightless.dry_run(dataset=TOKENS).sizes.parameters_after


def test_a_streamed_run_holds_a_layer_at_a_time(folder):
    whole, streamed = (
        FwdPruner.from_pretrained(folder, with_weights=False, low_memory=low).dry_run(dataset=TOKENS).run_memory
        for low in (False, True)
    )
    layer = tiny.make_model("llama_gqa_biases", mlp_bias=False).model.layers[0]

    assert whole["weights"] - streamed["weights"] == 2 * 2 * sum(weight.numel() for weight in layer.parameters())


def test_the_share_of_the_whole_model_comes_first(weightless):
    lines = str(weightless.dry_run(dataset=TOKENS)).splitlines()

    assert "of 77,952 parameters (-10.5%)" in lines[0]
    assert "belong to no unit of the kinds that are pruned, such as its embeddings" in lines[1]


def test_a_notebook_shows_sentences_and_a_table(weightless):
    shown = weightless.dry_run(dataset=TOKENS)._repr_html_()

    assert shown.startswith("<p>The pruned model will have") and "<table>" in shown
    # The head, and one row for all layers, which are alike.
    assert shown.count("<tr>") == 2 and "<td>0-2</td>" in shown and "MLP channels" in shown
    assert "<p>Calibration uses " in shown


def test_layers_that_rounding_makes_differ_share_a_row(weightless):
    def row(layer, channels, units=1000):
        parameters = {"before": 30 * units, "after": 30 * channels}
        return {"layer": layer, "mlp": {"kept": channels, "units": units, "parameters": parameters}}

    layers = [row(0, 1000), row(1, 980), row(2, 700), row(3, 732), row(4, 720), row(5, 800), row(6, 20, units=20)]
    foreseen = dataclasses.replace(weightless.dry_run(dataset=TOKENS), layers=layers)
    shown = foreseen._repr_html_().partition("<table>")[2]
    rows = [re.findall("<td>(.*?)</td>", line) for line in shown.split("</tr>") if "<td>" in line]

    assert rows == [
        ["0", "1000 / 1000", "30,000"],
        ["1", "980 / 1000", "29,400"],
        ["2-4", "700 to 732 / 1000", "21,000 to 21,960"],
        ["5", "800 / 1000", "24,000"],
        ["6", "20 / 20", "600"],
    ]
    assert foreseen.to_dict()["layers"] == layers


def test_layers_of_different_kinds_have_rows_of_their_own():
    pruner = FwdPruner(tiny_mixtures.make_mixture("qwen3_moe"))
    foreseen = pruner.dry_run(method="random", sparsity=0.25, kinds=["expert"], scope="layer", reconstruction="none")
    layers = foreseen.to_dict()["layers"]
    shown = foreseen._repr_html_().partition("<table>")[2]

    assert {kind for row in layers for kind in ("mlp", "expert") if kind in row} == {"mlp", "expert"}
    assert "<td></td>" in shown and str(foreseen)
