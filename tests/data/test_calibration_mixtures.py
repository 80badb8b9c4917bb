"""Calibration windows of several sources, each with its share."""

import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, FwdPruner, Mixture
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.record.reproduction import reproduction_of
from optimum_fwdprune.report import calibration_in_words
from optimum_fwdprune.request.files import json_values


@pytest.fixture
def model():
    return tiny.make_model("llama_gqa_biases")


def rows_of(token, count=20, length=8):
    return {"input_ids": [[token] * length] * count}


def windows(model, dataset=None, tokenizer=None, **request):
    return load_calibration(tiny.request(**{"n_samples": 8, "seq_len": 8, **request}), model, tokenizer, dataset)


def counts(calibration):
    return {int(token): int((calibration.input_ids[:, 0] == token).sum()) for token in calibration.input_ids.unique()}


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ([1, 1, 2], 8, {1: 2, 2: 2, 3: 4}),
        # By largest remainder: 2.5, 2.5 and 2.
        ([5, 5, 4], 7, {1: 3, 2: 2, 3: 2}),
        # No source is left out, however small its weight is.
        ([1, 1, 1000], 4, {1: 1, 2: 1, 3: 2}),
    ],
)
def test_windows_are_divided_by_weight(weights, count, expected, model):
    found = windows(model, Mixture([rows_of(token) for token in (1, 2, 3)], weights), n_samples=count)

    assert counts(found) == expected


def test_windows_of_all_sources_come_in_an_order_of_the_seed(model):
    mixture = Mixture([rows_of(1), rows_of(2)], [1, 1])
    orders = [windows(model, mixture, seed=seed, n_samples=16).input_ids[:, 0] for seed in (0, 0, 1)]

    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert len(orders[0][:8].unique()) == 2


def test_shorter_windows_are_padded(model):
    found = windows(model, Mixture([rows_of(1, length=5), rows_of(2)], [1, 1]))
    short = found.input_ids[:, 0] == 1

    assert found.attention_mask[short].sum(1).tolist() == [5] * 4
    assert found.attention_mask[~short].all()


def test_names_with_weights_are_a_mixture_in_the_request_and_as_data(model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200)
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [7, 7, 7, 7, 7, 7, 7, 7]}\n' * 60)
    names = [f"{tmp_path / 'text.txt'}:3", str(tmp_path / "rows.jsonl")]
    requested = windows(model, None, tokenizer, calibration=names)
    passed = windows(model, names, tokenizer)

    assert torch.equal(requested.input_ids, passed.input_ids)
    assert int((requested.input_ids == 7).all(1).sum()) == 2
    assert requested.source == "text.txt (75%), rows.jsonl (25%)"


def test_text_of_the_model_is_a_source_and_comes_after_the_checks_of_the_others(model, tokenizer, monkeypatch):
    calibration = windows(model, ["self", "builtin"], tokenizer)

    assert len(calibration) == 8 and calibration.source == "self (50%), builtin (50%)"
    monkeypatch.setattr("optimum_fwdprune.data.load_calibration.sample_from_model", None)
    with pytest.raises(OSError, match=r"There is no file missing\.txt"):
        windows(model, ["self", "missing.txt"], tokenizer)


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["wikitext2", "no name"], 8, "'no name' is no source of data in a mixture; name a file"),
        (["builtin", "self:2", "builtin"], 2, "3 sources needs as many windows; n_samples is 2"),
        (["builtin:0", "self"], 8, "above 0; got 0"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused(names, count, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        windows(model, None, tokenizer, calibration=names, n_samples=count)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([rows_of(1, 3), rows_of(2)], r"source 1 has 3 windows, and its share of n_samples is 4"),
        ([rows_of(10**6), rows_of(2)], r"source 1 cannot be used: The calibration data contains token 1000000"),
    ],
)
def test_a_source_that_cannot_fill_its_share_is_named(sources, message, model):
    with pytest.raises(ValueError, match=message):
        windows(model, Mixture(sources, [1, 1]))


def test_rows_with_images_are_not_mixed(model):
    images = Calibration(torch.ones(8, 8, dtype=torch.int64), inputs=({"pixel_values": torch.zeros(1, 2)},) * 8)

    with pytest.raises(ValueError, match="Rows with images cannot be mixed"):
        windows(model, Mixture([images, rows_of(2)], [1, 1]))


def test_the_record_names_the_sources_and_no_folder(model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200)
    names = [f"{tmp_path / 'text.txt'}:3", "builtin"]
    pruner = FwdPruner(model, tokenizer)
    pruner.prune(tiny.request(method="wanda_sp", calibration=names, sparsity=0.3, n_samples=4, seq_len=8))
    pruner.save_pretrained(tmp_path / "pruned")
    record = FwdPruner.from_pretrained(tmp_path / "pruned")._record
    made = reproduction_of(record, record.outcome.calibration)

    assert json_values(record.config)["calibration"] == ["text.txt:3", "builtin"]
    assert "--calibration text.txt:3 builtin" in made.command
    assert "`text.txt` is a file that the model was calibrated on; replace it by the path of your copy." in made.notes
    assert calibration_in_words(record.outcome.calibration) == "text.txt (75%), Python's documentation (25%)"
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "pruned").glob("*.json"))


def test_one_name_needs_no_list():
    assert tiny.request(calibration="builtin").calibration == "builtin"
    assert tiny.request(calibration=["builtin"]).calibration == "builtin"
    assert tiny.request(calibration=["builtin:2"]).calibration == ["builtin:2"]
    with pytest.raises(ValueError, match="calibration must be a list of str; got 3"):
        tiny.request(calibration=3)
