"""Training sequences of one source: packed text, the answers of chats, or token ids."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.answers import Answers
from ..data.chats import IGNORED
from ..data.messages import UnusableRow
from ..data.rows import CHAT, TEXT, TOKENS, Data
from ..data.texts import KINDS, always_text, detokenize, open_rows
from ..data.tokens import Tokens
from ..loading.tokenizers import starting_tokens
from ..runs.progress import progress
from .amounts import Wanted
from .documents import positions_and_labels
from .options import RecoveryOptions


# Tokens per sequence by default.
MAX_LENGTH = 512


def sequences_of(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RecoveryOptions,
    wanted: Wanted,
    longest: int | None = None,
    vocab_size: int | None = None,
) -> Dataset:
    """Return the training sequences of one source; see [`~optimum_fwdprune.recovery.training_data`]."""
    length = sequence_length(options, longest)
    if longest is not None and length > longest:
        raise ValueError(f"max_length={length} is more than the {longest} positions of the model.")

    def check_tokenizer(name: str) -> None:
        if tokenizer is None:
            raise ValueError(f"Training on {name} needs a tokenizer: FwdPruner(model, tokenizer).")

    if always_text(source):
        check_tokenizer(str(source))
    data = Data(*open_rows(source, options.dataset_config, options.dataset_split), options.dataset_column)
    if options.separate_documents and data.kind != TEXT:
        raise ValueError(
            f"separate_documents=True is for text, which is packed, and {data.name} holds {KINDS[data.kind]}, whose "
            f"rows are not joined. Leave it out."
        )
    if data.kind == TOKENS:
        sequences = _tokens(data, length, wanted)
    else:
        check_tokenizer(data.name)
        assert tokenizer is not None
        if data.kind == CHAT:
            sequences = _answers(data, tokenizer, length, wanted)
        else:
            sequences = _packed(data, tokenizer, length, wanted, options.separate_documents)
    _check_vocabulary(sequences, data.name, vocab_size)
    return sequences


def sequence_length(options: RecoveryOptions, longest: int | None) -> int:
    """Return the tokens of a training sequence: `max_length`, or by default the model's positions, but at most 512."""
    return min(MAX_LENGTH, longest or MAX_LENGTH) if options.max_length is None else options.max_length


def digest_of_sequences(data: Dataset) -> str:
    """Return a digest of training sequences: of their tokens, and of the labels, which tell what is trained on."""
    digest = hashlib.sha256()
    for column in ("input_ids", "labels"):
        for values in data.with_format("numpy")[column]:
            digest.update(values.astype("int64").tobytes() + b".")
    return digest.hexdigest()[:16]


def _tokens(data: Data, length: int, wanted: Wanted) -> Dataset:
    def sequences_of(row: Tokens) -> Iterator[dict[str, Any]]:
        # Padding that makes a row too long is cut off first.
        fits = len(row.input_ids) <= length
        pieces = [_labelled(piece) for piece in (row if fits else row.without_padding()).pieces(length)]
        counted = [piece for piece in pieces if (piece["labels"][1:] != IGNORED).any()]
        if not counted:
            raise UnusableRow("it has no token to predict: all of them are padding or have labels that do not count")
        yield from counted

    taken = list(wanted.taken(data.converted(sequences_of)))
    data.report()
    padded = any(not row["attention_mask"].all() for row in taken)
    names = ("input_ids", "labels", "attention_mask") if padded else ("input_ids", "labels")
    return Dataset.from_list([{name: row[name] for name in names} for row in taken])


def _labelled(tokens: Tokens) -> dict[str, np.ndarray]:
    """Return a training sequence whose padding does not count in the loss."""
    labels = tokens.input_ids if tokens.labels is None else tokens.labels
    return {
        "input_ids": tokens.input_ids,
        "labels": np.where(tokens.mask, labels, IGNORED),
        "attention_mask": tokens.mask.astype(np.int64),
    }


def _packed(data: Data, tokenizer: PreTrainedTokenizerBase, length: int, wanted: Wanted, separated: bool) -> Dataset:
    most = wanted.of_length(length)
    start = starting_tokens(tokenizer, length)
    of_text = length - len(start)
    # An array takes four bytes per token, a list nine times as much.
    tokens = array("i")
    starts: list[int] | None = [] if separated else None

    def needed() -> Iterator[Any]:
        for text in data:
            yield text
            if most and len(tokens) >= most * of_text:
                return

    for text in progress(needed(), "Tokenizing", unit="text"):
        ids = tokenizer(detokenize(text), add_special_tokens=False, verbose=False)["input_ids"]
        if starts is not None and ids:
            starts.append(len(tokens))
            tokens.extend(start)
        tokens.extend(ids)
        if ids and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    data.report()
    count = min(len(tokens) // of_text, most or len(tokens))
    if not count:
        raise ValueError(
            f"{data.name} is too short: it has {len(tokens)} tokens, and a training sequence has {of_text}. Lower "
            f"max_length, or train on more text."
        )
    texts = np.frombuffer(tokens, dtype=np.int32)[: count * of_text].reshape(count, of_text)
    sequences = np.hstack([np.tile(np.array(start, dtype=np.int32), (count, 1)), texts])
    if starts is None:
        return Dataset.from_dict({"input_ids": sequences, "labels": sequences})
    places = [place // of_text * length + len(start) + place % of_text for place in starts]
    positions, labels = positions_and_labels(sequences, places)
    return Dataset.from_dict({"input_ids": sequences, "labels": labels, "position_ids": positions})


def _answers(data: Data, tokenizer: PreTrainedTokenizerBase, length: int, wanted: Wanted) -> Dataset:
    answers = Answers(data, tokenizer, length)
    sequences = ({"input_ids": ids, "labels": labels} for ids, labels in answers)
    taken = list(progress(wanted.taken(sequences), "Tokenizing", unit="chat"))
    answers.report("trained on")
    return Dataset.from_list(taken)


def _check_vocabulary(sequences: Dataset, name: str, vocab_size: int | None) -> None:
    """Raise `ValueError` on tokens beyond the vocabulary, which would end the training with an index error."""
    if vocab_size is None:
        return
    for column, lowest in (("input_ids", 0), ("labels", IGNORED)):
        for ids in sequences.with_format("numpy")[column]:
            # The loss ignores a single negative number, in the labels.
            wrong = (ids < 0) & (ids != lowest)
            if wrong.any() or int(ids.max()) >= vocab_size:
                raise ValueError(
                    f"{column} of {name} has values from {ids.min()} to {ids.max()}, and the model's vocabulary has "
                    f"{vocab_size} tokens, from 0; were they made by another tokenizer?"
                )
