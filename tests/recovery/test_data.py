"""What training sees of every kind of data."""

import json

import datasets
import pytest
import torch

from optimum_fwdprune.recovery import RecoveryOptions, training_data
from optimum_fwdprune.recovery.data import IGNORED, collate


TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHAT = [
    {"role": "user", "content": "the quick"},
    {"role": "assistant", "content": "brown fox"},
    {"role": "user", "content": "the lazy"},
    {"role": "assistant", "content": "dog jumps"},
]


def options(**changes):
    return RecoveryOptions(**{"max_length": 8, **changes})


@pytest.fixture
def chatty(tokenizer):
    """A copy with a chat template of its own."""
    import copy

    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


def answers(row, tokenizer):
    """The words that count, and the rest."""
    counted = [label for label in row["labels"] if label != IGNORED]
    return tokenizer.decode(counted)


def test_text_is_packed_end_to_end(tokenizer):
    texts = ["the quick brown fox", "the lazy dog", "a fox jumps over"]
    data = training_data(texts, tokenizer, options())
    expected = []
    for text in texts:
        expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]

    assert [token for row in data["input_ids"] for token in row] == expected[: len(expected) // 8 * 8]
    assert list(data["labels"]) == list(data["input_ids"])
    assert all(len(row) == 8 for row in data["input_ids"])


def test_no_more_is_read_than_training_wants(tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": "the quick brown fox jumps over the lazy dog"}

    stream = datasets.IterableDataset.from_generator(endless)
    data = training_data(stream, tokenizer, options(), wanted=5)

    assert len(data) == 5 and len(read) < 20


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT[:2]},
        {"conversations": [{"from": "human", "value": "the quick"}, {"from": "gpt", "value": "brown fox"}]},
        {"prompt": "the quick", "completion": "brown fox"},
        {"instruction": "the quick", "output": "brown fox"},
        {"question": "the quick", "answer": "brown fox"},
    ],
)
def test_the_loss_is_on_the_answer_alone(row, chatty):
    (found,) = training_data([row], chatty, options(max_length=64))
    everything = "<s>user: the quick</s><s>assistant: brown fox</s>"

    assert chatty.decode(found["input_ids"]).replace(" ", "") == everything.replace(" ", "")
    assert answers(found, chatty).replace(" ", "") == "brownfox</s>"


def test_every_answer_of_a_chat_counts(chatty):
    (found,) = training_data([{"messages": CHAT}], chatty, options(max_length=128))

    assert answers(found, chatty).replace(" ", "") == "brownfox</s>dogjumps</s>"


def test_an_input_stands_between_instruction_and_answer(tokenizer):
    row = {"instruction": "the quick", "input": "brown", "output": "fox"}
    (found,) = training_data([row], tokenizer, options(max_length=64))

    assert tokenizer.decode(found["input_ids"]) == "the quick\n\nbrown\n\nfox</s>"
    assert answers(found, tokenizer) == "fox</s>"


def test_long_chats_are_cut_and_those_without_an_answer_left_out(chatty, monkeypatch):
    said = []
    monkeypatch.setattr("optimum_fwdprune.recovery.data.logger.warning", lambda text, *args: said.append(text % args))
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "the " * 100}, CHAT[1]]}]
    data = training_data(rows, chatty, options(max_length=40))

    assert len(data) == 1 and len(data[0]["input_ids"]) == 40
    assert said == ["1 rows of rows have no answer within 40 tokens and are left out."]


def test_files_and_tokens(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 20)
    tokens = torch.arange(24).view(3, 8)

    assert len(training_data(str(tmp_path / "chats.jsonl"), tokenizer, options(max_length=64))) == 1
    assert len(training_data(str(tmp_path / "text.txt"), tokenizer, options())) > 3
    assert training_data(tokens, None, options())["input_ids"][1] == tokens[1].tolist()
    labelled = training_data({"input_ids": [[1, 2, 3]], "labels": [[IGNORED, 2, 3]]}, None, options())
    assert labelled[0]["labels"] == [IGNORED, 2, 3]


def test_a_named_column_is_taken(tokenizer):
    rows = datasets.Dataset.from_dict({"title": ["x"] * 9, "body": ["the quick brown fox jumps"] * 9})
    data = training_data(rows, tokenizer, options(dataset_column="body"))

    assert "quick" in tokenizer.decode(data[0]["input_ids"])


def test_batches_are_padded_behind_their_end_and_only_where_they_must():
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}] * 2
    assert "attention_mask" not in collate(rows)
    short = {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])}
    batch = collate([rows[0], short])

    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ([], {}, "strings is empty; there is nothing to train on"),
        (
            ["too short"],
            {"max_length": 100},
            r"strings is too short: it has \d+ tokens.* sequence has 100",
        ),
        ([{"a": "x", "b": "y"}], {}, "rows has the columns a, b; name one"),
        ([{"a": "x", "b": "y"}], {"dataset_column": "text"}, "rows has no column 'text'; it has a, b"),
        ([{"messages": [{"role": "user", "content": "x"}]}], {}, "No row of rows has an answer"),
        ([{"messages": [{"who": "me", "says": "x"}]}], {}, "one in 'messages' has who, says"),
        ([{"turns": ["x", "y"]}], {"dataset_column": "turns"}, "one in 'turns' has a str"),
        ("nowhere.txt", {}, "There is no file nowhere.txt"),
        (3.5, {}, "Cannot read a float"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(source, changes, message, tokenizer):
    with pytest.raises((ValueError, OSError), match=message):
        training_data(source, tokenizer, options(**changes))


def test_sequences_are_no_longer_than_the_model_knows(tokenizer):
    texts = ["the quick brown fox jumps over the lazy dog"] * 60

    assert len(training_data(texts, tokenizer, options(max_length=None), longest=32)[0]["input_ids"]) == 32
    with pytest.raises(ValueError, match="max_length=64 is more than the 32 positions"):
        training_data(texts, tokenizer, options(max_length=64), longest=32)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        training_data(["the fox"], None, options())


def test_templates_that_rewrite_what_came_before_are_refused(chatty):
    chatty.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="changes what stands before an answer"):
        training_data([{"messages": CHAT}], chatty, options(max_length=64))


def test_of_a_dataset_of_splits_the_named_one_is_taken(tokenizer):
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"the {name} fox jumps over"] * 9}) for name in ("train", "test")
    }
    both = datasets.DatasetDict(splits)
    for name in splits:
        found = training_data(both, tokenizer, options(dataset_split=name))
        assert found.to_dict() == training_data(splits[name], tokenizer, options()).to_dict()
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        training_data(both, tokenizer, options(dataset_split="dev"))
