"""What training sees of every kind of data."""

import copy
import itertools
import json
import re

import datasets
import pandas
import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.recovery import RecoveryOptions, training_data
from optimum_fwdprune.recovery.amounts import Wanted
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
GOOD, TEXT = {"messages": CHAT[:2]}, "the quick brown fox jumps over the lazy dog" * 10


def options(**changes):
    return RecoveryOptions(**{"max_length": 8, **changes})


@pytest.fixture
def chatty(tokenizer):
    """A copy with a chat template of its own."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def warnings(monkeypatch):
    """Warnings of what is left out."""
    said = []
    for module in ("data.rows", "data.answers"):
        monkeypatch.setattr(f"optimum_fwdprune.{module}.logger.warning", lambda text, *args: said.append(text % args))
    return said


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


@pytest.mark.parametrize("source", [[TEXT] * 9, [GOOD] * 9], ids=["texts", "chats"])
def test_the_bar_of_a_part_of_the_data_ends_as_a_finished_one(source, chatty, monkeypatch):
    finished = []

    def watched(items, *_args, **_options):
        yield from items
        finished.append(True)

    monkeypatch.setattr("optimum_fwdprune.recovery.sequences.progress", watched)
    data = training_data(source, chatty, options(max_length=32), Wanted(sequences=2))

    # A notebook shows a bar whose loop was left in red.
    assert len(data) == 2 and finished == [True]


@pytest.mark.parametrize("separate", [False, True])
def test_sequences_start_with_the_tokens_that_the_tokenizer_writes_before_a_text(separate):
    tokenizer = tiny.make_tokenizer(begins_texts=True)
    texts = ["the quick brown fox", "the lazy dog", "a fox jumps over"] * 4
    data = training_data(texts, tokenizer, options(separate_documents=separate))
    bos, rows = tokenizer.bos_token_id, data["input_ids"]
    expected = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        expected += ids if separate else ids[1:]

    assert all(row[0] == bos and len(row) == 8 for row in rows)
    assert [token for row in rows for token in row[1:]] == expected[: len(expected) // 7 * 7]
    if separate:
        # Every document starts anew, and goes on after the BOS token of the sequence where it was cut.
        for row, positions, labels in zip(rows, data["position_ids"], data["labels"]):
            begins = [place == 0 or token == bos for place, token in enumerate(row)]
            assert [position == 0 for position in positions] == begins
            assert [label == IGNORED for label in labels] == begins
            assert all(after in (0, before + 1) for before, after in itertools.pairwise(positions))


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


@pytest.mark.parametrize(
    "source",
    [
        {"messages": CHAT[:2]},
        [{"instruction": "the quick", "input": float("nan"), "output": "brown fox", "system": pandas.NA}],
    ],
    ids=["one row", "missing values of pandas"],
)
def test_rows_of_other_forms_are_read(source, chatty):
    (found,) = training_data(source, chatty, options(max_length=64))

    assert answers(found, chatty).replace(" ", "") == "brownfox</s>"


def test_every_answer_of_a_chat_counts(chatty):
    (found,) = training_data([{"messages": CHAT}], chatty, options(max_length=128))

    assert answers(found, chatty).replace(" ", "") == "brownfox</s>dogjumps</s>"


def test_an_input_stands_between_instruction_and_answer(tokenizer):
    row = {"instruction": "the quick", "input": "brown", "output": "fox"}
    (found,) = training_data([row], tokenizer, options(max_length=64))

    assert tokenizer.decode(found["input_ids"]) == "the quick\n\nbrown\n\nfox</s>"
    assert answers(found, tokenizer) == "fox</s>"


def test_long_chats_are_cut_and_those_without_an_answer_left_out(chatty, warnings):
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "the " * 100}, CHAT[1]]}, GOOD]
    whole = training_data(rows[::2], chatty, options(max_length=200))
    assert warnings == []
    data = training_data(rows, chatty, options(max_length=40))

    assert len(data) == 2 and len(data[0]["input_ids"]) == 40
    total, kept = (sum(label != IGNORED for row in rows["labels"] for label in row) for rows in (whole, data))
    assert (
        "1 of 3 rows of rows are left out. The first of them is row 1, counted from 0: it has no answer" in warnings[0]
    )
    assert warnings[1:] == [
        f"1 of 2 chats of rows are longer than max_length=40 tokens. They are cut to this length, so that "
        f"{total - kept} of the {total} tokens of all answers are not trained on. Raise max_length to keep them."
    ]


def test_files_and_tokens(tokenizer, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 20)
    tokens = torch.arange(24).view(3, 8)

    assert len(training_data(str(tmp_path / "chats.jsonl"), tokenizer, options(max_length=64))) == 1
    assert len(training_data(str(tmp_path / "text.txt"), tokenizer, options())) > 3
    assert training_data(tokens, None, options())["input_ids"][1] == tokens[1].tolist()
    labelled = training_data({"input_ids": [[1, 2, 3]], "labels": [[IGNORED, 2, 3]]}, None, options())
    assert labelled[0]["labels"] == [IGNORED, 2, 3]


@pytest.fixture(params=["right", "left"])
def padded(request, tokenizer):
    """A padded batch of texts of different lengths."""
    padding = copy.deepcopy(tokenizer)
    padding.pad_token, padding.padding_side = "</s>", request.param
    return padding(["the quick brown fox jumps", "the dog", "over the lazy dog"], padding=True, return_tensors="pt")


@pytest.mark.parametrize("form", ["batch", "dataset", "rows", "columns of lists", "stream", "batches"])
def test_padding_of_tokens_does_not_count_and_is_hidden(form, padded):
    lists = {name: values.tolist() for name, values in padded.items()}
    source = {
        "batch": padded,
        "dataset": datasets.Dataset.from_dict(lists),
        "rows": [dict(zip(lists, row)) for row in zip(*lists.values())],
        "columns of lists": lists,
        "stream": datasets.Dataset.from_dict(lists).to_iterable_dataset(),
        "batches": [padded],
    }[form]
    data = training_data(source, None, options(max_length=64))
    mask = padded["attention_mask"].bool()

    assert data["attention_mask"][:] == padded["attention_mask"].tolist()
    assert torch.equal(torch.tensor(data["input_ids"][:]), padded["input_ids"])
    assert torch.equal(torch.tensor(data["labels"][:]), padded["input_ids"].where(mask, torch.tensor(IGNORED)))


def test_a_padded_batch_has_the_loss_of_its_texts_without_padding(padded):
    model = tiny.make_model("llama_gqa_biases")
    rows = list(training_data(padded, None, options(max_length=64)))
    lengths = padded["attention_mask"].sum(1).tolist()
    bare = [training_data({"input_ids": [row]}, None, options(max_length=64))[0] for row in unpadded(padded)]
    with torch.no_grad():
        losses = [model(**collate(each)).loss.item() for each in (rows, bare)]

    assert [len(row["input_ids"]) for row in bare] == lengths
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def unpadded(batch):
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]


def test_labels_are_respected_where_nothing_is_padded(padded):
    labels = padded["input_ids"].clone()
    labels[0, 2:] = IGNORED
    data = training_data({**padded, "labels": labels}, None, options(max_length=64))

    assert torch.equal(
        torch.tensor(data["labels"][:]), labels.where(padded["attention_mask"].bool(), torch.tensor(IGNORED))
    )


LONG = torch.arange(100) % 50


@pytest.mark.parametrize(
    "source",
    [
        LONG,
        LONG[None],
        LONG.tolist(),
        [LONG.tolist()],
        LONG.numpy(),
        {"input_ids": LONG[None], "attention_mask": torch.ones(1, 100, dtype=torch.int64)},
        {"input_ids": LONG.tolist()},
        datasets.Dataset.from_dict({"input_ids": [LONG.tolist()]}),
    ],
    ids=["tensor", "table", "list", "list of lists", "array", "batch", "list in a mapping", "dataset"],
)
def test_rows_of_tokens_that_are_too_long_are_cut(source):
    data = training_data(source, None, options(max_length=16))

    assert [len(row) for row in data["input_ids"]] == [16] * 6 + [4]
    assert [token for row in data["input_ids"] for token in row] == LONG.tolist()
    assert len(training_data(source, None, options(max_length=16), wanted=3)) == 3


def test_padding_that_makes_a_row_too_long_is_cut_off(padded):
    length = padded["input_ids"].shape[1] - 1
    data = training_data(padded, None, options(max_length=length))

    assert "attention_mask" not in data.column_names
    # Of a row that is longer by one token, nothing predicts that one.
    assert list(data["input_ids"]) == [row[:length] for row in unpadded(padded)]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": TEXT}, {"text": None}], "row 1, counted from 0: text is null, not a text"),
        ([{"text": None, "title": "x"}, {"text": TEXT, "title": "x"}], "row 0, counted from 0: text is null or empty"),
        ([TEXT, 5.0], "row 1, counted from 0: text is a float, not a text"),
        ([TEXT, None], "row 1, counted from 0: text is null"),
        ([{"question": "the", "answer": None}, {"question": "the", "answer": "fox"}], "answer is null, not a text"),
        ([GOOD, {"messages": None}], "row 1, counted from 0: it has no messages"),
        ([{"messages": []}, GOOD], "row 0, counted from 0: messages is empty"),
        ([GOOD, {"messages": [{"role": "user", "content": None}, CHAT[1]]}], "a message of user in 'messages' has no"),
        ([GOOD, {"messages": CHAT[1:2]}], "row 1, counted from 0: its messages of the assistant are part"),
        ([GOOD, {"messages": [CHAT[0], {"role": "assistant", "content": " "}]}], "its answers are empty"),
        (
            [GOOD, {"messages": [{"role": "narrator", "content": "x"}]}],
            "no message of the role assistant, only of narr",
        ),
        ([GOOD, TEXT], "it has no messages; it has text"),
        ([TEXT, [1, 2, 3]], "it has no text; it has input_ids"),
        ([[1, 2, 3], TEXT], "it has no input_ids; it has text"),
        ([{"messages": "[{broken"}, GOOD], "row 0, counted from 0: messages is a str, not a list of messages"),
        ([GOOD, {"messages": [{"role": "system", "content": "x"}, *CHAT[:2]]}], "refuses it: No system role here"),
        ([[1, 2, 3], [1]], "row 1, counted from 0: it has no token to predict"),
        ([[1, 2, 3], [0.5, 1.5]], "row 1, counted from 0: input_ids is not a list of integers"),
        ([[1, 2, 3], []], "row 1, counted from 0: input_ids is empty"),
        (
            [{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}],
            r"labels has the shape \[1\] and input_ids \[2",
        ),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "attention_mask": [0, 0]}], "it has no token to predict"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(rows, reason, chatty, warnings):
    chatty.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role here') }}{% endif %}" + TEMPLATE
    )
    data = training_data(rows, chatty, options(max_length=60))

    assert len(data) > 0
    assert len(warnings) == 1 and warnings[0].startswith("1 of 2 rows of ") and re.search(reason, warnings[0])


def test_data_none_of_which_can_be_used_is_refused_however_long(chatty, warnings):
    endless = ({"messages": [{"role": "user", "content": 5}]} for _ in iter(int, 1))
    with pytest.raises(ValueError, match=r"None of 1000 rows of rows can be used.* a message of user .* is a int"):
        training_data(endless, chatty, options())


def test_what_a_template_writes_anew_is_trained_turn_by_turn(chatty):
    chatty.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    data = training_data([{"messages": CHAT}], chatty, options(max_length=64))

    assert [answers(row, chatty).replace(" ", "") for row in data] == ["brownfox", "dogjumps"]


def test_tokens_of_another_vocabulary_are_refused_before_training():
    for rows, message in (([[1, 300]], "input_ids of rows has values from 1 to 300.* 300 tokens"), ([[-1, 3]], "-1")):
        with pytest.raises(ValueError, match=message):
            training_data(rows, None, options(), vocab_size=300)


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
        ([], {}, "strings is empty; it has no rows"),
        (
            ["too short"],
            {"max_length": 100},
            r"strings is too short: it has \d+ tokens.* sequence has 100",
        ),
        ([{"a": "x", "b": "y"}], {}, "rows has the columns a, b. Set dataset_column"),
        ([{"a": "x", "b": "y"}], {"dataset_column": "text"}, "rows has no column 'text'; it has the columns a, b"),
        ([{"messages": CHAT[:1]}], {}, "None of 1 rows of rows can be used.* no message of the role assistant, only"),
        ([{"messages": [{"who": "me", "says": "x"}]}], {}, "one in 'messages' has who, says"),
        ([{"turns": ["x", "y"]}], {"dataset_column": "turns"}, "one in 'turns' has a str"),
        ("nowhere.txt", {}, "There is no file nowhere.txt"),
        ("self", {}, "'self' is text that a model generates itself, for calibration and for training with a teacher"),
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


IDS = torch.arange(8).view(2, 4)
HALF = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
SCORES = torch.where(HALF == 1, 0.0, -torch.inf)


@pytest.mark.parametrize("as_rows", [False, True], ids=["batch", "rows"])
@pytest.mark.parametrize(
    ("batch", "lengths"),
    [
        ({"input_ids": IDS, "attention_mask": None, "labels": None}, [4, 4]),
        ({"input_ids": IDS.tolist(), "attention_mask": None}, [4, 4]),
        ({"input_ids": IDS, "attention_mask": HALF.float()}, [3, 2]),
        ({"input_ids": IDS, "attention_mask": HALF.bfloat16().requires_grad_()}, [3, 2]),
        ({"input_ids": IDS, "attention_mask": HALF.bool().numpy()}, [3, 2]),
        (
            {"input_ids": IDS, "attention_mask": HALF.cfloat()},
            "attention_mask is a tensor of torch.complex64; pass integers",
        ),
        ({"input_ids": IDS, "attention_mask": HALF.float().tolist()}, [3, 2]),
        ({"input_ids": IDS, "attention_mask": SCORES}, "attention_mask has values below 0, like a mask that is added"),
        (
            {"input_ids": IDS, "attention_mask": HALF[:, :3]},
            r"\[2, 4\]; it has \[2, 3\]|the shape .*3\] and input_ids",
        ),
        (
            {"input_ids": IDS, "attention_mask": HALF[:, None, None]},
            r"attention_mask has the shape \[2, 1, 1, 4\], not",
        ),
        ({"input_ids": IDS[None]}, r"input_ids has the shape \[1, 2, 4\], not \[tokens\] or \[sequences, tokens\]"),
        ({"input_ids": IDS.to_sparse()}, r"input_ids is a sparse or nested tensor; pass a dense one"),
        ({"input_ids": IDS, "attention_mask": HALF.to_sparse()}, "attention_mask is a sparse or nested tensor"),
        ({"input_ids": IDS.to("meta")}, "input_ids is a tensor on the meta device"),
    ],
)
def test_calibration_and_training_take_the_same_tokens_and_masks(batch, lengths, as_rows):
    source = [batch] if as_rows else batch
    request, model = tiny.request(n_samples=2, seq_len=4), tiny.make_model("llama_gqa_biases")
    if isinstance(lengths, str):
        for read in (
            lambda: training_data(source, None, options()),
            lambda: load_calibration(request, model, None, source),
        ):
            with pytest.raises(ValueError, match=lengths):
                read()
        return
    trained = training_data(source, None, options())
    calibration = load_calibration(request, model, None, source)

    masks = [row.get("attention_mask", [1] * 4) for row in trained]
    assert [sum(mask) for mask in masks] == lengths and calibration.num_tokens == sum(lengths)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"input_ids": None}, "Cannot read a dict whose columns are None: input_ids; pass"),
        ({"input_ids": 5}, "Cannot read a dict whose column 'input_ids' is a int; pass a mapping of columns to lists"),
        ({"input_ids": IDS, "attention_mask": 5}, "Cannot read a dict whose column 'attention_mask' is a int"),
        ({"text": "the fox"}, "Cannot read a dict whose column 'text' is a str"),
        (IDS[None], r"the data has the shape|input_ids has the shape \[1, 2, 4\], not"),
        (IDS.to_sparse(), "is a sparse or nested tensor"),
        (torch.tensor(3), r"has the shape \[\], not"),
        (dict, "Cannot read a type"),
    ],
)
def test_calibration_and_training_refuse_the_same_sources(source, message, tokenizer):
    model = tiny.make_model("llama_gqa_biases")
    with pytest.raises(ValueError, match=message):
        training_data(source, tokenizer, options())
    with pytest.raises(ValueError, match=message):
        load_calibration(tiny.request(n_samples=2, seq_len=4), model, tokenizer, source)


def test_the_mask_counts_whatever_the_column_of_token_ids_is_called(tokenizer):
    rows = [{"ids": [3, 4, 5, 1, 1], "attention_mask": [1, 1, 1, 0, 0]}]
    (row,) = training_data(rows, tokenizer, options(dataset_column="ids"))

    assert list(row["labels"]) == [3, 4, 5, -100, -100]


def test_an_end_that_a_tokenizer_writes_is_not_put_between_a_prompt_and_its_answer():
    words = tiny.make_tokenizer()
    words._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", words.bos_token_id), ("</s>", words.eos_token_id)]
    )
    (row,) = training_data([{"prompt": "the quick", "completion": " fox"}], words, options(max_length=64))

    ids = list(row["input_ids"])
    assert ids[0] == words.bos_token_id and words.eos_token_id not in ids[1:-1]
