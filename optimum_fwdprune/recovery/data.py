"""Training sequences: text packed to full length, or chats and instructions with the loss on their answers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ..loggers import get_logger
from ..texts import detokenize, holds_splits, open_rows
from ..utils import progress
from .options import RecoveryOptions


logger = get_logger(__name__)

# Labels that do not count in the loss.
IGNORED = -100

# Tokens per sequence where nobody says.
MAX_LENGTH = 512

# Columns by which data says what it is, and how its rows become messages of a chat.
CHATS = ("messages", "conversation", "conversations")
# ShareGPT's words for who speaks, which are those of most data with `conversations`.
SPEAKERS = {"human": "user", "gpt": "assistant"}
# What asks and what answers; an optional input stands between the two.
QUESTIONS = {"prompt": "completion", "instruction": "output", "question": "answer"}


def training_data(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RecoveryOptions,
    wanted: int | None = None,
    longest: int | None = None,
) -> Dataset:
    """Return sequences to train on, with columns `input_ids` and `labels`.

    Columns say what the data is: `input_ids` (and `labels`) are taken as they are; `messages` are a chat (with `role`
    and `content`, or ShareGPT's `from` and `value`), and `prompt`
    and `completion`, `instruction` (`input`) and `output`, or `question` and `answer` become one, put through the
    tokenizer's chat template where it has one, with the loss on the answers alone; anything else is text, packed end
    to end into sequences of `max_length` tokens.

    Args:
        source: what [`open_rows`] reads, or a mapping of columns, or a tensor of token ids `[sequences, tokens]`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for all but token ids.
        options (`RecoveryOptions`): `max_length` and the `dataset_*` fields.
        wanted (`int`, *optional*): read no more than so many sequences.
        longest (`int`, *optional*): positions that the model knows.

    Raises:
        ValueError: where the data is empty or too short, a named column is missing (listing those there are), or a
            chat template does not let answers be told from questions.
    """
    length = min(MAX_LENGTH, longest or MAX_LENGTH) if options.max_length is None else options.max_length
    if longest is not None and length > longest:
        raise ValueError(f"max_length={length} is more than the {longest} positions that the model knows.")
    if hasattr(source, "tolist"):
        source = {"input_ids": source.tolist()}
    if isinstance(source, Mapping) and not holds_splits(source):
        source = Dataset.from_dict(dict(source))
    name, rows = open_rows(source, options.dataset_config, options.dataset_split)
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{name} is empty; there is nothing to train on.")
    column = options.dataset_column
    if column is not None and column not in first:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(first)}.")
    everything = chain([first], iterator)
    if column is None and "input_ids" in first:
        return _tokens(everything, wanted)
    if tokenizer is None:
        raise ValueError(f"Training on {name} needs a tokenizer: FwdPruner(model, tokenizer).")
    chat = _chat_of(first, column)
    if chat is not None:
        return _answers(map(chat, everything), tokenizer, length, name, wanted)
    return _packed((row[_text_column(row, column, name)] for row in everything), tokenizer, length, name, wanted)


def _tokens(rows: Iterable[dict], wanted: int | None) -> Dataset:
    taken = [
        {"input_ids": list(row["input_ids"]), "labels": list(row.get("labels", row["input_ids"]))}
        for _, row in zip(range(wanted) if wanted else iter(int, 1), rows)
    ]
    return Dataset.from_list(taken)


def _text_column(row: dict, column: str | None, name: str) -> str:
    strings = [key for key, value in row.items() if isinstance(value, str)]
    found = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if found is None or found not in strings:
        raise ValueError(f"{name} has the columns {', '.join(row)}; name one of text or messages as dataset_column.")
    return found


def _chat_of(row: dict, column: str | None) -> Callable[[dict], list[dict]] | None:
    """Return how rows like this one become messages, or `None` where they are plain text."""
    for name in CHATS if column is None else (column,):
        if isinstance(row.get(name), list):
            return lambda row: [_message(each, name) for each in row[name]]
    for question, answer in QUESTIONS.items():
        if column is None and isinstance(row.get(question), str) and isinstance(row.get(answer), str):
            return lambda row: [
                {"role": "user", "content": "\n\n".join(filter(None, (row[question], row.get("input"))))},
                {"role": "assistant", "content": row[answer]},
            ]
    return None


def _message(given: Any, column: str) -> dict:
    """A message with `role` and `content`, which ShareGPT calls `from` and `value`."""
    if isinstance(given, Mapping):
        if given.keys() >= {"role", "content"}:
            return dict(given)
        if given.keys() >= {"from", "value"}:
            return {"role": SPEAKERS.get(given["from"], given["from"]), "content": given["value"]}
    found = ", ".join(given) if isinstance(given, Mapping) else f"a {type(given).__name__}"
    raise ValueError(f"A message of a chat has role and content, or from and value; one in {column!r} has {found}.")


def _packed(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    name: str,
    wanted: int | None,
) -> Dataset:
    # Four bytes a token: a list would take nine times as much.
    tokens = array("i")
    for text in progress(texts, "Tokenizing", unit="text"):
        ids = tokenizer(detokenize(text), add_special_tokens=False, verbose=False)["input_ids"]
        tokens.extend(ids)
        if ids and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if wanted and len(tokens) >= wanted * length:
            break
    count = min(len(tokens) // length, wanted or len(tokens))
    if not count:
        raise ValueError(
            f"{name} is too short: it has {len(tokens)} tokens, and a training sequence has {length}. Lower "
            f"max_length, or train on more text."
        )
    sequences = np.frombuffer(tokens, dtype=np.int32)[: count * length].reshape(count, length)
    return Dataset.from_dict({"input_ids": sequences, "labels": sequences})


def _answers(
    chats: Iterable[list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    name: str,
    wanted: int | None,
) -> Dataset:
    found: list[dict] = []
    unanswered = 0
    for messages in progress(chats, "Tokenizing", unit="chat"):
        ids, labels = _labelled(messages, tokenizer)
        ids, labels = ids[:length], labels[:length]
        # The first token is predicted from nothing.
        if any(label != IGNORED for label in labels[1:]):
            found.append({"input_ids": ids, "labels": labels})
        else:
            unanswered += 1
        if wanted and len(found) >= wanted:
            break
    if not found:
        raise ValueError(
            f"No row of {name} has an answer within its first {length} tokens; raise max_length, or look at the roles "
            f"of its messages: answers are those of the assistant."
        )
    if unanswered:
        logger.warning("%d rows of %s have no answer within %d tokens and are left out.", unanswered, name, length)
    return Dataset.from_list(found)


def _labelled(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat, and the same with everything but the assistant's words ignored."""
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for text, is_answer in _turns(messages, tokenizer):
        if not text.startswith(before):
            raise ValueError(
                "The tokenizer's chat template changes what stands before an answer once the answer is there, so the "
                "answer cannot be told apart. Use a template that only appends, or rows with a column of text."
            )
        # A template writes its own first token. Piece by piece, as a prompt and what is generated after it.
        special = not ids and tokenizer.chat_template is None
        new = tokenizer(text[len(before) :], add_special_tokens=special, verbose=False)["input_ids"]
        ids += new
        labels += new if is_answer else [IGNORED] * len(new)
        before = text
    return ids, labels


def _turns(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Yield the chat up to where an answer begins, and up to where it ends, answer after answer."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            yield _render(messages[:number], tokenizer, begin_answer=True), False
            yield _render(messages[: number + 1], tokenizer, begin_answer=False), True


def _render(messages: list[dict], tokenizer: PreTrainedTokenizerBase, begin_answer: bool) -> str:
    if tokenizer.chat_template is not None:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin_answer))
    # Without a template: paragraphs, and an end behind every answer.
    ends = {"assistant": tokenizer.eos_token or "\n\n"}
    return "".join(message["content"] + ends.get(message["role"], "\n\n") for message in messages)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack sequences, the shorter ones padded behind their end: labels with what does not count.

    The mask is left out where nothing is padded, which lets attention take its fastest kernel.
    """
    length = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        fill = IGNORED if name == "labels" else 0
        batch[name] = torch.stack(
            [
                functional.pad(value, (0, 0) * (value.dim() - 1) + (0, length - len(value)), value=fill)
                for value in values
            ]
        )
        if not batch[name].is_floating_point():
            batch[name] = batch[name].long()
    if any(len(row["input_ids"]) < length for row in rows):
        places = torch.arange(length)
        batch["attention_mask"] = torch.stack([(places < len(row["input_ids"])).long() for row in rows])
    return batch
