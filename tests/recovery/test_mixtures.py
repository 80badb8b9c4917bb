"""Mixtures of sources by weight, and text that the teacher writes itself."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, Mixture, PruningConfig, RecoveryArguments
from optimum_fwdprune.recovery import RecoveryOptions, training_data
from optimum_fwdprune.recovery.amounts import Wanted
from optimum_fwdprune.recovery.data import TrainingTexts


REQUEST = PruningConfig(method="magnitude", kinds=["attention", "mlp"], reconstruction="none", sparsity=0.4)


def rows_of(token, count, length=8):
    return {"input_ids": [[token] * length] * count}


def shares(data):
    counts: dict[int, int] = {}
    for row in data["input_ids"]:
        counts[row[0]] = counts.get(row[0], 0) + len(row)
    return counts


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), {1: 80, 2: 160, 3: 80}),
        (Wanted(tokens=128), {1: 32, 2: 64, 3: 32}),
        (Wanted(sequences=8), {1: 16, 2: 32, 3: 16}),
    ],
)
def test_tokens_are_divided_by_weight_up_to_the_source_that_ends_first(wanted, expected):
    mixture = Mixture([rows_of(1, 10), rows_of(2, 50), rows_of(3, 50)], [1, 2, 1])
    data = training_data(mixture, None, RecoveryOptions(max_length=8), wanted)

    assert shares(data) == expected


def test_files_are_mixed_by_the_weights_in_their_names(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200)
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [7, 7, 7, 7]}\n' * 60)
    names = [str(tmp_path / "text.txt"), f"{tmp_path / 'rows.jsonl'}:0.5"]
    data = training_data(names, tokenizer, RecoveryOptions(max_length=8), Wanted(tokens=240))

    sevens = sum(len(row) for row in data["input_ids"] if row[0] == 7 and len(row) == 4)
    assert sevens == 80 and sum(map(len, data["input_ids"])) == 240
    assert TrainingTexts(names).name == "text.txt (67%), rows.jsonl (33%)"


def test_padding_of_one_source_stays_hidden():
    padded = {"input_ids": [[5, 5, 5, 0]], "attention_mask": [[1, 1, 1, 0]]}
    data = training_data(Mixture([padded, rows_of(2, 1, 4)], [1, 1]), None, RecoveryOptions(max_length=8))

    assert data["attention_mask"][:] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert data["labels"][0] == [5, 5, 5, -100]


@pytest.mark.parametrize(
    "texts",
    [["the quick brown fox", "the lazy dog"], ["wikitext2", "the lazy dog"], ["a fox. jumps"], [["wikitext2"]]],
)
def test_texts_are_no_names(texts):
    assert Mixture.of(texts) is None


@pytest.mark.parametrize("names", [["wikitext2"], ["self", "data.jsonl:2"], ["someone/chats:0.25", "builtin"]])
def test_names_are_a_mixture(names):
    assert len(Mixture.of(names).sources) == len(names)


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [([], [], "got 0 sources"), (["a.txt"], [1, 2], "1 sources and 2 weights"), (["a.txt"], [0], "above 0; got 0")],
)
def test_weights_that_fit_no_sources_are_refused(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sources, weights)


def arguments(tmp_path, **changes):
    values = {"output_dir": str(tmp_path / "training"), "max_length": 12, "per_device_train_batch_size": 2}
    return RecoveryArguments(**values | {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | changes)


def pruner_of(tokenizer):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.prune(REQUEST)
    return pruner


@pytest.mark.parametrize("mode", ["distill", "block_distill"])
def test_the_teacher_writes_the_text_once(mode, tokenizer, tmp_path, monkeypatch):
    dense = tiny.make_model("llama_gqa_biases")
    options = {"mode": mode, "tokens": "216", "learning_rate": 1e-3}
    first, written, prompts = pruner_of(tokenizer), [], []
    generate = type(dense).generate

    def counted(self, *args, **kwargs):
        prompts.append(args[0].shape[1])
        written.append(generate(self, *args, **kwargs))
        return written[-1]

    monkeypatch.setattr(type(dense), "generate", counted)
    first.recover("self", arguments(tmp_path, **options), teacher=dense)
    calls = len(written)
    again = pruner_of(tokenizer)
    again.recover("self", arguments(tmp_path, **options), teacher=dense)

    assert calls > 1 and len(written) == calls
    assert first.recovery["dataset"] == "self"
    assert all(torch.equal(*pair) for pair in zip(first.model.parameters(), again.model.parameters()))
    assert prompts == [1, 2, 1][: len(prompts)] and len(prompts) > 1
    # The second batch begins with random tokens, which are not special.
    ids = torch.cat([batch[:, 1:3] for batch in written[1:2]])
    assert len(set(ids[:, 0].tolist())) > 1 and not set(ids[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert all(batch.shape[1] == 13 for batch in written)


def test_written_text_is_mixed_with_other_text(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 200)
    pruner = pruner_of(tokenizer)
    names = [str(tmp_path / "text.txt"), "self:3"]
    pruner.recover(
        names, arguments(tmp_path, mode="distill", tokens="192"), teacher=tiny.make_model("llama_gqa_biases")
    )

    assert pruner.recovery["steps"] == 8 and pruner.recovery["dataset"] == "text.txt (25%), self (75%)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "lora", "max_steps": 2}, "mode='lora' has no teacher"),
        ({"mode": "distill"}, r"as much as is wanted: set tokens \(such as tokens='1M'\), time or max_steps"),
        ({"mode": "block_distill"}, "as much as is wanted"),
    ],
)
def test_text_without_a_writer_or_an_end_is_refused(changes, message, tokenizer, tmp_path):
    teacher = tiny.make_model("llama_gqa_biases") if "distill" in changes["mode"] else None
    with pytest.raises(ValueError, match=message):
        pruner_of(tokenizer).recover(["self", "builtin"], arguments(tmp_path, **changes), teacher=teacher)
    assert not (tmp_path / "training").exists()
