"""Where calibration tokens come from, and what happens where they do not."""

import codecs
import copy
import json
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import tiny
import torch
import transformers

from optimum_fwdprune import Calibration, FwdPruner
from optimum_fwdprune.data import load_calibration as module
from optimum_fwdprune.data import tables
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.data.texts import detokenize


TEXTS = [f"the quick brown fox number {number} jumps over the lazy dog" for number in range(60)]
REQUEST = {"n_samples": 6, "seq_len": 16}
# Of which the tokens of the fixture are no more, and no longer.
FITTING = {"n_samples": 16, "seq_len": 24}


@pytest.fixture
def model():
    return tiny.make_model("llama_gqa_biases")


@pytest.fixture
def warnings(monkeypatch):
    said = []
    for of_module in (module, tables):
        monkeypatch.setattr(of_module.logger, "warning", lambda text, *args: said.append(text % args))
    return said


def windows(model, tokenizer, dataset=None, **request):
    return load_calibration(tiny.request(**{**REQUEST, **request}), model, tokenizer, dataset)


def write(folder, name, texts=TEXTS, column="text"):
    path = folder / name
    if path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_dict({column: texts}).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps({column: text, "id": 3}) for text in texts))
    return str(path)


@pytest.mark.parametrize("name", ["text.txt", "rows.jsonl", "rows.parquet"])
def test_local_files(name, model, tokenizer, tmp_path):
    found = windows(model, tokenizer, calibration=write(tmp_path, name))

    assert found.input_ids.shape == (6, 16) and found.input_ids.dtype == torch.int64
    assert found.source == name
    assert "quick brown" in tokenizer.decode(found.input_ids.flatten())


def test_strings_datasets_and_streams_of_the_same_text_give_the_same_windows(model, tokenizer, tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    found = [
        windows(model, tokenizer, source).input_ids
        for source in (TEXTS, dataset, dataset.to_iterable_dataset(), write(tmp_path, "rows.jsonl"))
    ]

    assert all(torch.equal(found[0], other) for other in found[1:])


def test_columns_loaders_and_other_datasets_give_the_same_windows(model, tokenizer):
    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return len(TEXTS)

        def __getitem__(self, number):
            return {"text": TEXTS[number]}

    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    expected = windows(model, tokenizer, TEXTS).input_ids
    for source in (dataset["text"], tuple(TEXTS), Texts(), torch.utils.data.DataLoader(Texts(), batch_size=None)):
        assert torch.equal(windows(model, tokenizer, source).input_ids, expected)


def test_batches_of_a_loader_are_read_row_by_row(model, tokens):
    wrapped = torch.utils.data.TensorDataset(tokens)
    named = datasets.Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    for source in (wrapped, named):
        for loader in (source, torch.utils.data.DataLoader(source, batch_size=5)):
            assert torch.equal(windows(model, None, loader, **FITTING).input_ids, tokens)
    with pytest.raises(ValueError, match="A row is 2 tensors without names; pass mappings"):
        windows(model, None, torch.utils.data.TensorDataset(tokens, torch.ones_like(tokens)))


def test_windows_are_seeded_different_and_in_the_text(model, tokenizer):
    first, again, other = (windows(model, tokenizer, TEXTS, seed=seed).input_ids for seed in (1, 1, 2))
    text = tokenizer("".join(text + "\n\n" for text in TEXTS), add_special_tokens=False)["input_ids"]

    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 6
    for row in first.tolist():
        assert any(text[start : start + 16] == row for start in range(0, len(text), 16))


def test_windows_start_with_the_tokens_that_the_tokenizer_writes_before_a_text(model):
    tokenizer = tiny.make_tokenizer(begins_texts=True)
    found = windows(model, tokenizer, TEXTS).input_ids
    text = tokenizer("".join(text + "\n\n" for text in TEXTS), add_special_tokens=False)["input_ids"]

    assert found.shape == (6, 16)
    for first, *row in found.tolist():
        assert first == tokenizer.bos_token_id
        assert any(text[start : start + 15] == row for start in range(0, len(text), 15))
    written, bare = (windows(model, used, calibration="self").input_ids for used in (tokenizer, tiny.make_tokenizer()))
    assert written[:, 0].tolist() == [tokenizer.bos_token_id] * 6
    assert torch.equal(written[:, 1:], bare[:, :-1])
    with pytest.raises(ValueError, match=r"Windows of 1 tokens hold no text: each starts with 1 special tokens.*<s>"):
        windows(model, tokenizer, TEXTS, seq_len=1)


def test_tokens_that_fit_are_taken_as_they_are(model, tokens):
    assert windows(model, None, tokens, **FITTING).input_ids is tokens
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert windows(model, None, batch, **FITTING).attention_mask is batch["attention_mask"]
    calibration = Calibration(tokens, source="mine")
    assert windows(model, None, calibration) is calibration


LONG = torch.arange(300)


@pytest.mark.parametrize(
    "source",
    [
        LONG,
        LONG[None],
        LONG.numpy(),
        LONG.tolist(),
        [LONG.tolist()],
        {"input_ids": LONG[None], "attention_mask": torch.ones(1, 300, dtype=torch.int64)},
        transformers.BatchEncoding({"input_ids": LONG.tolist(), "attention_mask": [1] * 300}),
        [{"input_ids": LONG[None]}],
        datasets.Dataset.from_dict({"input_ids": [LONG.tolist()]}),
        LONG.view(3, 100),
        LONG.view(3, 100).tolist(),
    ],
    ids=[
        "tensor", "table", "array", "list", "list of lists", "batch", "encoding", "list of batches", "dataset",
        "long rows", "lists of long rows",
    ],
)  # fmt: skip
def test_rows_of_tokens_that_are_too_long_are_cut_into_windows(source, model):
    found = windows(model, None, source)

    assert found.input_ids.shape == (6, 16) and found.attention_mask is None
    for row in found.input_ids.tolist():
        assert row == list(range(row[0], row[0] + 16))
    assert found.input_ids[:, 0].unique().numel() == 6
    other = windows(model, None, source, seed=1).input_ids
    assert not torch.equal(found.input_ids, other)
    assert torch.equal(windows(model, None, source).input_ids, found.input_ids)


def test_of_long_rows_that_hold_too_few_windows_all_are_taken(model, warnings):
    found = windows(model, None, LONG[:40])

    assert found.input_ids.tolist() == [list(range(16)), list(range(16, 32))]
    assert warnings == ["tokens has 2 windows of up to 16 tokens, and n_samples is 6; all of them are used."]


def test_no_more_than_n_samples_of_a_table_are_taken(model, tokens, warnings):
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    found = windows(model, None, batch, seq_len=24)

    assert found.input_ids.shape == (6, 24) and torch.equal(found.attention_mask, mask[:6])
    assert {tuple(row) for row in found.input_ids.tolist()} < {tuple(row) for row in tokens.tolist()}
    assert len(warnings) == 1 and "has 16 windows, of which n_samples=6 are drawn" in warnings[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_what_is_cut(side, model):
    rows = torch.zeros(2, 50, dtype=torch.int64)
    place = slice(10, None) if side == "left" else slice(None, 40)
    rows[:, place] = torch.arange(1, 81).view(2, 40)
    found = windows(model, None, {"input_ids": rows, "attention_mask": (rows > 0).long()})

    assert sorted(found.input_ids.flatten().tolist()) == [*range(1, 33), *range(41, 73)]
    assert found.attention_mask is None


# The same six rows of unequal lengths, in every form that tokens come in.
UNEQUAL = [list(range(number, number + 3 + number)) for number in range(6)]


@pytest.mark.parametrize(
    "form", ["lists", "tensors", "mapping", "rows", "dataset", "padded", "stream", "generator", "jsonl"]
)
def test_tokens_of_different_lengths_are_windows_of_their_own(form, model, tmp_path):
    padded = {
        "input_ids": [[*row, *[7] * (8 - len(row))] for row in UNEQUAL],
        "attention_mask": [[1] * len(row) + [0] * (8 - len(row)) for row in UNEQUAL],
    }
    rows = [{"input_ids": row} for row in UNEQUAL]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {
        "lists": UNEQUAL,
        "tensors": [torch.tensor(row) for row in UNEQUAL],
        "mapping": {"input_ids": UNEQUAL},
        "rows": rows,
        "dataset": datasets.Dataset.from_dict({"input_ids": UNEQUAL}),
        "padded": datasets.Dataset.from_dict(padded),
        "stream": datasets.Dataset.from_dict(padded).to_iterable_dataset(),
        "generator": (row for row in rows),
        "jsonl": str(tmp_path / "rows.jsonl"),
    }[form]
    found = windows(model, None, source)

    assert [ids[mask.bool()].tolist() for ids, mask in zip(found.input_ids, found.attention_mask)] == UNEQUAL


CHATS = [[{"role": "user", "content": text}, {"role": "assistant", "content": "over the dog"}] for text in TEXTS]
SHARED = [[{"from": "human", "value": text}, {"from": "gpt", "value": "over the dog"}] for text in TEXTS]


@pytest.mark.parametrize(
    "source",
    [
        [{"messages": chat} for chat in CHATS],
        CHATS,
        [message for chat in CHATS for message in chat],
        {"messages": CHATS},
        [{"conversations": chat} for chat in SHARED],
        [message for chat in SHARED for message in chat],
        [json.dumps(chat) for chat in SHARED],
        [{"prompt": text, "completion": "over the dog"} for text in TEXTS],
        [{"question": text, "answer": "over the dog"} for text in TEXTS],
        datasets.Dataset.from_dict({"messages": CHATS}),
        datasets.DatasetDict(train=datasets.Dataset.from_dict({"messages": CHATS, "text": TEXTS})),
        "chats.jsonl",
        "chats.parquet",
    ],
    ids=[
        "rows", "lists", "one chat", "columns", "ShareGPT", "one chat of ShareGPT", "JSON", "prompts", "questions",
        "dataset", "splits", "jsonl", "parquet",
    ],
)  # fmt: skip
def test_chats_are_written_by_the_template_and_put_end_to_end(source, model, tokenizer, tmp_path):
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    if isinstance(source, str):
        source = str(tmp_path / source)
        data = datasets.Dataset.from_dict({"messages": CHATS})
        data.to_parquet(source) if source.endswith("parquet") else data.to_json(source)
    found = windows(model, speaking, source)
    text = "".join(f"<user>{text}</s><assistant>over the dog</s>" for text in TEXTS)
    ids = speaking(text, add_special_tokens=False)["input_ids"]

    assert found.input_ids.shape == (6, 16)
    for row in found.input_ids.tolist():
        assert any(ids[start : start + 16] == row for start in range(0, len(ids), 16))


def test_a_generator_of_texts_is_read_no_further_than_needed(model, tokenizer):
    read = []

    def texts():
        while True:
            read.append(1)
            yield "the quick brown fox " * 1000

    assert windows(model, tokenizer, texts()).input_ids.shape == (6, 16)
    assert len(read) < 100


def test_rows_that_cannot_be_used_are_left_out_and_counted(model, tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr("optimum_fwdprune.data.rows.logger.warning", lambda text, *args: said.append(text % args))
    expected = windows(model, tokenizer, TEXTS).input_ids

    assert torch.equal(windows(model, tokenizer, [None, *TEXTS[:3], 7, *TEXTS[3:]]).input_ids, expected)
    assert said == [
        "2 of 62 rows of rows are left out. The first of them is row 0, counted from 0: text is null or empty."
    ]
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('No roles here') }}"
    with pytest.raises(ValueError, match=r"None of 60 rows of rows can be used.* template refuses it: No roles here"):
        windows(model, refusing, CHATS)


def test_a_batch_of_the_tokenizer_is_taken_with_its_padding(model, tokenizer):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="</s>")
    batch = tokenizer([*TEXTS[:4], "the lazy dog"], padding=True, return_tensors="pt")
    found = windows(model, tokenizer, batch)

    assert found.attention_mask.sum(1).unique().numel() > 1


@pytest.mark.parametrize("kind", ["list", "np", "rows of arrays", "rows of tensors"])
def test_a_batch_need_not_be_of_tensors(kind, model, tokens):
    mask = (tokens > 20).long()
    make = {
        "list": torch.Tensor.tolist,
        "np": torch.Tensor.numpy,
        "rows of arrays": lambda rows: list(rows.numpy()),
        "rows of tensors": list,
    }[kind]
    found = windows(model, None, {"input_ids": make(tokens), "attention_mask": make(mask)}, **FITTING)

    assert torch.equal(found.input_ids, tokens) and torch.equal(found.attention_mask, mask)


@pytest.mark.parametrize("dtype", ["int32", "int16", "uint16", "int64", ">i4"])
def test_tokens_of_other_integers_and_arrays_become_int64(dtype, model, tokens):
    array = tokens.numpy().astype(dtype)[::-1]
    array.flags.writeable = False
    given = [array.astype(dtype)] if dtype == ">i4" else [array, torch.tensor(array.copy())]
    for source in given:
        found = windows(model, None, source, **FITTING)

        assert found.input_ids.dtype == torch.int64 and torch.equal(found.input_ids, tokens.flip(0))


def test_a_split_of_several_is_taken(model, tokenizer):
    data = datasets.Dataset.from_dict({"text": TEXTS})
    other = datasets.Dataset.from_dict({"text": ["something else"]})
    expected = windows(model, tokenizer, data).input_ids
    streams = {"train": other.to_iterable_dataset(), "mine": data.to_iterable_dataset()}
    for source in (datasets.DatasetDict(train=other, mine=data), datasets.IterableDatasetDict(streams)):
        assert torch.equal(windows(model, tokenizer, source, dataset_split="mine").input_ids, expected)
        with pytest.raises(ValueError, match=r"no split 'test'; it has train, mine\. Name one as dataset_split"):
            windows(model, tokenizer, source, dataset_split="test")


def test_strings_of_pandas_and_numpy_are_read(model, tokenizer):
    expected = windows(model, tokenizer, TEXTS).input_ids
    # A title is not taken for the text that the first row lacks.
    frame = pandas.DataFrame({"title": ["some title"] * 61, "text": [None, *TEXTS]})
    data = datasets.Dataset.from_pandas(frame, preserve_index=False)
    formatted = (data.with_format("pandas", columns=["text"]), data.to_iterable_dataset().with_format("arrow"))
    arrays = (np.array(TEXTS), np.array(TEXTS, dtype=object))
    for source in (frame, frame.text, pandas.Series(TEXTS), *arrays, *formatted):
        assert torch.equal(windows(model, tokenizer, source).input_ids, expected)


@pytest.mark.parametrize("column", ["text", "story"])
@pytest.mark.parametrize("place", [0, 1, 60])
def test_rows_without_a_text_are_skipped(column, place, model, tokenizer):
    expected = windows(model, tokenizer, TEXTS).input_ids
    data = datasets.Dataset.from_dict({column: [*TEXTS[:place], None, *TEXTS[place:]], "id": range(61)})

    assert torch.equal(windows(model, tokenizer, data).input_ids, expected)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_name_that_is_a_pattern_is_read_itself(suffix, model, tokenizer, tmp_path):
    write(tmp_path, f"g1{suffix}", ["something else"] * 60)
    path = write(tmp_path, f"g[1]{suffix}")

    assert "quick brown" in tokenizer.decode(windows(model, tokenizer, calibration=path).input_ids.flatten())


def test_a_file_gives_the_same_windows_from_any_folder(model, tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path, "rows.jsonl")
    expected = windows(model, tokenizer, calibration=path).input_ids
    monkeypatch.chdir(tmp_path)

    assert torch.equal(windows(model, tokenizer, calibration="rows.jsonl").input_ids, expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "café\n".encode("latin-1") * 99, r"a\.txt is not UTF-8: it has the byte 0xe9"),
        ("a.jsonl", '{"text": "café"}\n'.encode("latin-1"), r"a\.jsonl is not UTF-8: it has the byte 0xe9"),
        ("a.txt", "the fox\n".encode("utf-16"), r"a\.txt is not UTF-8: it begins with the byte order mark of UTF-16"),
        ("a.jsonl", '{"text": "fox"}\n'.encode("utf-16-le"), r"a\.jsonl is not UTF-8: .* or has null bytes\. Save it"),
        ("a.jsonl", b"{not json\n", r"a\.jsonl cannot be read as \.jsonl: JSON parse error"),
        ("a.parquet", b"no parquet at all", r"a\.parquet cannot be read as \.parquet: Parquet magic bytes"),
    ],
)
def test_malformed_files_are_named(name, content, message, model, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        windows(model, tokenizer, calibration=str(tmp_path / name))


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(model, tokenizer):
    model.resize_token_embeddings(200)
    with pytest.raises(ValueError, match=r"contains token 2\d\d, beyond the model's vocabulary of 200"):
        windows(model, tokenizer, TEXTS)


@pytest.mark.parametrize("source", ["self", "text", "tokens"])
def test_windows_beyond_learned_positions_are_refused(source, tokenizer, monkeypatch):
    model = tiny.make_model("opt_pre_norm")
    dataset = {"self": None, "text": TEXTS * 20, "tokens": torch.ones(2, 129, dtype=torch.int64)}[source]
    request = {"calibration": "self", "n_samples": 2}
    # What reaches the last position works.
    fitting = dataset[:, :128] if source == "tokens" else dataset
    assert windows(model, tokenizer, fitting, seq_len=128, **request).input_ids.shape == (2, 128)

    def unexpected(*_, **__):
        raise AssertionError("Nothing should be read or written.")

    monkeypatch.setattr(module, "tokenized_at_once", unexpected)
    monkeypatch.setattr(module, "sample_from_model", unexpected)
    with pytest.raises(ValueError, match=r"windows of 129 tokens are longer than .* 128 learned positions"):
        windows(model, tokenizer, dataset, seq_len=129, **request)


def test_padding_takes_no_learned_position():
    model = tiny.make_model("opt_pre_norm")
    ids, mask = torch.ones(2, 150, dtype=torch.int64), torch.ones(2, 150, dtype=torch.int64)
    mask[:, :22] = 0

    assert windows(model, None, {"input_ids": ids, "attention_mask": mask}, seq_len=128).input_ids is ids
    assert model(ids, attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama_gqa_biases", "bloom"])
def test_positions_that_are_computed_have_no_end(name):
    """A vocabulary as large as the positions is no table of them."""
    model = tiny.make_model(name, max_position_embeddings=tiny.VOCAB)
    ids = torch.ones(2, tiny.VOCAB + 1, dtype=torch.int64)

    assert windows(model, None, ids, seq_len=tiny.VOCAB + 1).input_ids is ids


@pytest.mark.parametrize("source", ["one token", "no mask", "lone tokens", "text"])
def test_windows_with_nothing_to_predict_are_refused(source, model, tokenizer, tokens):
    mask = torch.zeros_like(tokens)
    if source == "lone tokens":
        mask[:, ::2] = 1
    dataset = {"one token": tokens[:, :1], "text": TEXTS}.get(source, {"input_ids": tokens, "attention_mask": mask})
    with pytest.raises(ValueError, match=r"no token to predict from the one before it: it is .* windows of seq_len"):
        windows(model, tokenizer, dataset, seq_len=1)


def test_a_source_without_its_tokenizer_is_named_briefly(model):
    with pytest.raises(ValueError, match="Calibrating on a list needs a tokenizer"):
        windows(model, None, TEXTS)
    with pytest.raises(ValueError, match=r"Calibrating on 'text\.txt' needs a tokenizer"):
        windows(model, None, "text.txt")


def test_a_tokenizer_without_a_padding_token_prunes_and_saves(model, tmp_path):
    tokenizer = tiny.make_tokenizer()
    assert tokenizer.pad_token is None
    pruner = FwdPruner(model, tokenizer)
    for source in (TEXTS, "self"):
        pruner.prune(tiny.request(sparsity=0.1, **REQUEST), source)
    pruner.save_pretrained(tmp_path / "out")

    assert tokenizer.pad_token is None
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None


def test_a_named_column_is_taken(model, tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl", column="story")
    assert windows(model, tokenizer, calibration=path).input_ids.shape == (6, 16)

    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(json.dumps({"title": text, "story": "none"}) for text in TEXTS))
    with pytest.raises(ValueError, match=r"columns title, story\. Set dataset_column to the one that holds text"):
        windows(model, tokenizer, calibration=str(both))
    found = windows(model, tokenizer, calibration=str(both), dataset_column="title")
    assert "quick brown" in tokenizer.decode(found.input_ids.flatten())


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("nothing", r"has no column 'nothing'; it has the columns text, id\. Set dataset_column to the one"),
        ("id", "has a int in the column id, which is neither text nor messages nor a list of token ids; set"),
    ],
)
def test_a_column_that_is_missing_or_no_text_is_refused(column, message, model, tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl")
    with pytest.raises(ValueError, match=message):
        windows(model, tokenizer, calibration=path, dataset_column=column)


def test_self_is_seeded_equally_long_and_needs_no_text(model):
    first, again, other = (
        load_calibration(tiny.request(calibration="self", seed=seed, **REQUEST), model, None) for seed in (1, 1, 2)
    )

    assert first.input_ids.shape == (6, 16) and first.source == "self"
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_self_leaves_the_random_state_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    windows(model, None, calibration="self")

    assert torch.equal(torch.rand(3), expected)


def test_self_on_the_cpu_seeds_no_accelerator(model, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)

    windows(model, None, calibration="self")

    assert not seeded


def test_self_draws_from_the_models_distribution():
    """A model that says two tokens, one seven times as often, writes them so; where it would stop, it goes on."""
    model = tiny.make_model("llama_gqa_biases")
    head = torch.nn.Linear(48, tiny.VOCAB)
    head.weight.data.zero_(), head.bias.data.fill_(-100)
    head.bias.data[[11, 12, model.config.eos_token_id]] = torch.tensor([7.0, 1.0, 4.0]).log()
    model.lm_head = head
    ids = windows(model, None, calibration="self", n_samples=64, seq_len=32).input_ids

    assert set(ids.unique().tolist()) == {11, 12}
    assert (ids == 11).float().mean().item() == pytest.approx(7 / 8, abs=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(100))},
        {"typical_p": 0.3, "min_p": 0.2, "epsilon_cutoff": 0.01},
        {"num_beams": 3},
        {"max_time": 0.0},
        {"stop_strings": ["a"]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_self_is_written_whatever_the_model_is_set_to_generate_with(options, model):
    expected = windows(model, None, calibration="self").input_ids
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config

    assert torch.equal(windows(model, None, calibration="self").input_ids, expected)
    assert model.generation_config is own and getattr(own, name) == value


def test_self_puts_the_generation_config_back_where_writing_fails(model, monkeypatch):
    own = model.generation_config
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: torch.ones(6, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"generate\(\) returned \[6, 3\] tokens, but \[6, 16\] were requested"):
        windows(model, None, calibration="self")

    assert model.generation_config is own


def test_self_needs_a_model_that_writes(tokens):
    model = tiny.make_model("llama_gqa_biases", transformers.AutoModel)
    with pytest.raises(ValueError, match="LlamaModel cannot generate text"):
        windows(model, None, calibration="self")


def test_without_the_hub_the_default_is_self_and_says_so(model, tokenizer, monkeypatch):
    logged = []
    monkeypatch.setattr(module.logger, "warning", lambda message, *args: logged.append(message % args))

    assert windows(model, tokenizer).source == "self"
    assert len(logged) == 1 and "WikiText-2 is not available" in logged[0] and "`calibration`" in logged[0]
    # The tests are offline themselves.
    assert "HF_HUB_OFFLINE is set" in logged[0] and logged[0].endswith("or unset that variable.")


def test_without_a_network_the_default_is_self_and_says_how_to_use_the_cache(model, tokenizer, monkeypatch, warnings):
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError())
    )

    assert windows(model, tokenizer).source == "self"
    assert "(ConnectionError)" in warnings[0] and "set HF_HUB_OFFLINE=1 if WikiText-2 is in the cache" in warnings[0]


@pytest.mark.parametrize("source", ["wikitext2", "c4", "some/dataset"])
def test_datasets_that_are_not_in_the_cache_are_refused_offline_with_a_way_out(source, model, tokenizer):
    with pytest.raises(OSError, match=r"in the cache of the Hub, and HF_HUB_OFFLINE is set.* Unset it .* name a file"):
        windows(model, tokenizer, calibration=source)


def test_with_the_hub_the_default_is_wikitext2(model, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": TEXTS}))

    found = windows(model, tokenizer)
    assert found.source == "wikitext2"
    assert "quick brown" in tokenizer.decode(found.input_ids.flatten())


@pytest.mark.parametrize("preset", ["wikitext2", "c4", "someone/something"])
def test_hub_datasets_are_streamed_and_read_no_further_than_needed(preset, model, tokenizer, monkeypatch):
    """Neither preset may be downloaded whole: C4 alone would fill a disk."""
    asked, rows = [], []

    def endless():
        while True:
            rows.append(len(rows))
            yield {"text": " ".join(TEXTS)}

    def load_dataset(path, name=None, split=None, streaming=False):
        asked.append((path, streaming))
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    found = windows(model, tokenizer, calibration=preset)

    path = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}.get(preset, preset)
    assert asked == [(path, True)] and found.source == preset
    assert len(rows) < 3000


def test_builtin(model, tokenizer):
    assert "Python" in tokenizer.decode(
        windows(model, tokenizer, calibration="builtin", n_samples=64, seq_len=512).input_ids.flatten()
    )


def test_wikitexts_marks_are_undone():
    assert detokenize("the <unk> of 1 @,@ 234 @.@ 5 well @-@ known") == "the of 1,234.5 well-known"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["too short"], r"strings is too short: it has \d windows of 16 tokens, and n_samples is 6"),
        ([], "strings is empty; it has no rows"),
        ("the quick\nbrown fox", r"'the quick\\nbrown fox' is not the name of a file or dataset; pass .*: \[text\]"),
        ("the fox " * 1000, r"the fox \.\.\.' is not the name of a file"),
        (" ", "' ' is not the name of a file"),
        ("nothing.txt", "There is no file nothing.txt"),
        ({"a": 1}, "Cannot read a dict"),
        (3.5, "Cannot read a float"),
        (torch.zeros(0, 4, dtype=torch.int64), r"must be \[n_samples, seq_len\] and not empty; got \(0, 4\)"),
        (torch.zeros(2, 2, 4, dtype=torch.int64), r"has the shape \[2, 2, 4\], not \[tokens\]"),
        (torch.zeros(2, 4), "must be int64 token ids; got torch.float32"),
        (torch.ones(2, 4, dtype=torch.bool), "must be int64 token ids; got torch.bool"),
        (np.zeros((2, 4)), "must be int64 token ids; got torch.float64"),
        (np.zeros((0,), dtype=int), r"must be \[n_samples, seq_len\] and not empty; got \(1, 0\)"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"the shape of input_ids, \[1, 2\]; it has \[1, 1\]"),
        ({"input_ids": [[1, 2, 3], [3, 4]], "attention_mask": [[1], [1]]}, r"attention_mask has the shape \[1\]"),
        ({"input_ids": ["a", "b"]}, "None of 2 rows of rows can be used.*input_ids is not a list of integers"),
        ({"text": ["the fox"], "id": [1, 2]}, "The columns have different lengths: text has 1, id has 2"),
        (pandas.DataFrame({"id": [1], "length": [2]}), "has the columns id, length. Set dataset_column"),
        (pandas.Series([1, 2]), "has a int in the column text, which is neither text"),
        (torch.full((2, 4), -100), "contains token -100, but tokens start at 0"),
        (torch.full((2, 4), 300), r"token 300.*vocabulary of 300"),
    ],
)
def test_bad_sources_are_named(source, message, model, tokenizer):
    with pytest.raises((ValueError, OSError), match=message):
        windows(model, tokenizer, source)


def test_empty_datasets_and_files_are_refused(model, tokenizer, tmp_path):
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} is empty"):
            windows(model, tokenizer, calibration=str(tmp_path / name))
    with pytest.raises(ValueError, match="dataset is empty; it has no rows"):
        windows(model, tokenizer, datasets.Dataset.from_dict({"text": []}))
    (tmp_path / "data.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"must end in one of \.txt, \.jsonl"):
        windows(model, tokenizer, calibration=str(tmp_path / "data.csv"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_the_mark_of_the_encoding_is_no_part_of_the_text(suffix, model, tokenizer, tmp_path):
    path = write(tmp_path, f"text{suffix}")
    expected = windows(model, tokenizer, calibration=path).input_ids
    marked = tmp_path / f"marked{suffix}"
    marked.write_bytes(codecs.BOM_UTF8 + Path(path).read_bytes())

    assert torch.equal(windows(model, tokenizer, calibration=str(marked)).input_ids, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]],), r"input_ids of a Calibration must be a tensor \[n_samples, seq_len\]; got a list"),
        ((None,), "input_ids of a Calibration must be a tensor .*; got a NoneType"),
        ((torch.ones(1, 2).long(), 5), "attention_mask of a Calibration must be a tensor .*; got a int"),
        ((torch.ones(1, 2).long(), torch.ones(2, 2)), r"the shape of input_ids, \[1, 2\]; it has \[2, 2\]"),
        ((torch.ones(1, 2).long(), torch.tensor([[0, -torch.inf]])), "attention_mask has values below 0"),
        ((torch.ones(1, 2).long().to_sparse(),), "input_ids is a sparse or nested tensor"),
    ],
)
def test_a_calibration_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Calibration(*arguments)


def test_a_mask_of_numbers_becomes_int64(tokens):
    mask = (tokens > 20).float()

    assert torch.equal(Calibration(tokens, mask).attention_mask, mask.long())
