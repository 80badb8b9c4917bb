"""Streams are read no further than a request needs, and little of them is held at a time."""

import datasets
import pytest
import tiny
import torch

from optimum_fwdprune import Mixture
from optimum_fwdprune.data import tables
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.data.mixing import ROWS, Mixing
from optimum_fwdprune.data.text_windows import CHARACTERS_PER_TOKEN
from optimum_fwdprune.data.texts import open_rows


SENTENCE = "the quick brown fox number {} jumps over the lazy dog and runs away from the slow old cat"


class Stream:
    """Rows without an end, and how many of them were read."""

    def __init__(self, row=lambda number: {"text": SENTENCE.format(number)}):
        self.row, self.read = row, 0

    def rows(self):
        while True:
            self.read += 1
            yield self.row(self.read)

    def dataset(self):
        return datasets.IterableDataset.from_generator(self.rows)

    @property
    def characters(self):
        return sum(len(self.row(number)["text"]) for number in range(1, self.read + 1))


@pytest.fixture
def model():
    return tiny.make_model("llama_gqa_biases")


@pytest.fixture
def on_the_hub(monkeypatch):
    """Puts streams on the Hub, by name."""
    streams = {}

    def load_dataset(path, name=None, split=None, streaming=False):
        assert streaming
        return streams[path].dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    return streams


def windows(model, tokenizer, dataset=None, **request):
    return load_calibration(tiny.request(**{"n_samples": 4, "seq_len": 16, **request}), model, tokenizer, dataset)


def characters_of(n_samples, seq_len=16):
    """The characters of the tokens that `n_samples` windows are drawn from, and of one more row."""
    return CHARACTERS_PER_TOKEN * tables.POOL_FACTOR * n_samples * seq_len + len(SENTENCE) + 10


@pytest.mark.parametrize("n_samples", [1, 4, 64])
def test_a_stream_is_read_as_far_as_windows_are_drawn_from(n_samples, model, tokenizer):
    stream = Stream()
    found = windows(model, tokenizer, stream.dataset(), n_samples=n_samples)

    assert found.input_ids.shape == (n_samples, 16)
    # One more row is read where the library looks for the columns.
    assert stream.characters <= characters_of(n_samples) + len(SENTENCE) + 10


@pytest.mark.parametrize("n_samples", [1, 4, 64])
def test_a_dataset_of_the_hub_is_read_no_further_than_its_order_needs(n_samples, model, tokenizer, on_the_hub):
    stream = on_the_hub["someone/something"] = Stream()
    found = windows(model, tokenizer, calibration="someone/something", n_samples=n_samples)

    assert len(found) == n_samples
    # Twice: for the windows, and for the buffer that rows are shuffled in.
    assert stream.characters <= 2 * characters_of(n_samples)


def test_a_seed_determines_the_windows_of_a_stream(model, tokenizer, on_the_hub):
    def drawn(seed):
        on_the_hub["someone/something"] = Stream()
        return windows(model, tokenizer, calibration="someone/something", n_samples=32, seed=seed).input_ids

    first, again, other = map(drawn, (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("preset", ["text", "tokens", "chats"])
def test_each_source_of_a_mixture_is_read_as_far_as_its_share_needs(preset, model, tokenizer):
    rows = {
        "text": lambda number: {"text": SENTENCE.format(number)},
        "tokens": lambda number: {"input_ids": [number % 300] * 16},
        "chats": lambda number: {"messages": [{"role": "user", "content": SENTENCE.format(number)}]},
    }
    streams = [Stream(rows[preset]), Stream(rows[preset])]
    windows(model, tokenizer, Mixture([stream.dataset() for stream in streams], [3, 1]), n_samples=64)
    few, alone = Stream(rows[preset]), Stream(rows[preset])
    windows(model, tokenizer, few.dataset(), n_samples=16)
    windows(model, tokenizer, alone.dataset(), n_samples=48)

    assert [stream.read for stream in streams] == [alone.read, few.read]
    assert few.read < alone.read < 8 * 64 * 16 / 8


def test_tokens_of_a_stream_are_read_window_by_window(model):
    stream = Stream(lambda number: {"input_ids": [number % 300] * 16})
    windows(model, None, stream.dataset(), n_samples=5)

    # One more row is read where the library looks for the columns.
    assert 5 * tables.POOL_FACTOR <= stream.read <= 5 * tables.POOL_FACTOR + 1


def test_many_windows_are_drawn_from_a_limited_surplus(model, monkeypatch):
    monkeypatch.setattr(tables, "MAX_SURPLUS", 160)
    stream = Stream(lambda number: {"input_ids": [number % 300] * 16})
    windows(model, None, stream.dataset(), n_samples=50)

    assert 60 <= stream.read <= 61


def test_the_buffer_that_rows_are_shuffled_in_holds_few_characters(on_the_hub):
    stream = on_the_hub["long/books"] = Stream(lambda number: {"text": "a" * 10_000, "id": number})
    _, rows = open_rows("long/books", mixing=Mixing(0, characters=50_000))
    taken = []
    for row in rows:
        taken.append(row["id"])
        # One row comes, and another goes.
        assert stream.read - len(taken) <= 6
        if len(taken) == 100:
            break

    assert len(set(taken)) == 100 and taken != sorted(taken)


def test_short_rows_are_shuffled_within_a_buffer_of_rows_and_none_is_lost():
    rows = [{"text": "ab", "tags": ["c", "d"], "id": number} for number in range(3 * ROWS)]
    mixed = [row["id"] for row in Mixing(3, characters=10**9).mixed(rows)]

    assert sorted(mixed) == list(range(3 * ROWS))
    assert mixed == [row["id"] for row in Mixing(3, characters=10**9).mixed(rows)]
    assert mixed != [row["id"] for row in Mixing(4, characters=10**9).mixed(rows)]
    # A row comes at most a buffer too early.
    assert all(number - place <= ROWS for place, number in enumerate(mixed))
    # Rows from everywhere in the buffer come first.
    assert max(mixed[:100]) > ROWS // 2
