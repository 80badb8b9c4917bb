"""What a row of data holds: text, a chat, or tokens. Rows that cannot be used are left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from .chats import CHATS, QUESTIONS, UnusableRow, chat_of
from .loggers import get_logger


logger = get_logger(__name__)

# What rows hold.
TEXT, CHAT, TOKENS = "text", "chat", "tokens"

# A stream without an end must not be read for ever in search of a row that can be used.
GIVE_UP = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """A sequence of tokens as its row holds it.

    Args:
        input_ids (`ndarray[tokens]`, int64): the tokens, padding included.
        mask (`ndarray[tokens]`, bool): False where a token is padding.
        labels (`ndarray[tokens]`, int64, *optional*): what the row says should be predicted.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray | None = None

    def without_padding(self) -> Tokens:
        """Return the tokens that are no padding."""
        labels = None if self.labels is None else self.labels[self.mask]
        return Tokens(self.input_ids[self.mask], self.mask[self.mask], labels)

    def pieces(self, length: int) -> Iterator[Tokens]:
        """Yield the sequence in pieces of `length` tokens; the last one is as short as the sequence leaves it."""
        for start in range(0, len(self.input_ids), length):
            part = slice(start, start + length)
            labels = None if self.labels is None else self.labels[part]
            yield Tokens(self.input_ids[part], self.mask[part], labels)


class Data:
    """Rows of one kind, which the first row that can be used decides.

    A row has tokens where it has a column `input_ids`; a chat where it has `messages`, `conversation` or
    `conversations`, or `prompt` and `completion`, `instruction` and `output`, or `question` and `answer`; and else
    text: in the column `text`, or in the only one of strings. A row that cannot be used, such as one whose text is
    null, is left out and counted.

    Args:
        name (`str`): of the source, for messages.
        rows (`Iterable[Mapping]`): the rows.
        column (`str`, *optional*): the column of the text, the messages or the tokens, whatever the others are.

    Attributes:
        kind (`str`): `"text"`, `"chat"` or `"tokens"`.

    Raises:
        ValueError: where there are no rows, where none of them can be used, or where the columns leave open which one
            holds the data (listing those there are).
    """

    def __init__(self, name: str, rows: Iterable[Mapping], column: str | None = None):
        self.name = name
        self._column = column
        self._rows = enumerate(rows)
        self._used = 0
        self._left_out = 0
        self._first_reason = ""
        self.kind, self._first = self._settled()

    def converted(self, convert: Callable[[Any], Iterable[T]]) -> Iterator[T]:
        """Yield what `convert` makes of every row, which is a `str`, a `Chat` or `Tokens`.

        A row for which `convert` raises `UnusableRow` is left out. Call [`report`] once all that is wanted has been
        read.
        """
        for number, row in chain([self._first], self._rows):
            try:
                results = [result for item in self._items(row) for result in convert(item)]
            except UnusableRow as error:
                self._leave_out(number, error)
                continue
            self._used += 1
            yield from results

    def __iter__(self) -> Iterator[Any]:
        return self.converted(lambda item: [item])

    def report(self) -> None:
        """Warn of the rows that were left out.

        Raises:
            ValueError: where none was used.
        """
        if not self._used:
            raise ValueError(
                f"None of {self._left_out} rows of {self.name} can be used. {self._first_reason} Another column can "
                f"be named as dataset_column."
            )
        if self._left_out:
            logger.warning(
                "%d of %d rows of %s are left out. %s",
                self._left_out,
                self._left_out + self._used,
                self.name,
                self._first_reason,
            )

    def _settled(self) -> tuple[str, tuple[int, Mapping]]:
        """The kind of the rows, and the first one that has something of that kind."""
        for number, row in self._rows:
            kind = self._kind_of(row)
            if kind is not None:
                return kind, (number, row)
            self._leave_out(number, UnusableRow(f"{_empty_columns(row)} is null or empty"))
        if self._left_out:
            self.report()
        raise ValueError(f"{self.name} is empty; it has no rows.")

    def _kind_of(self, row: Mapping) -> str | None:
        """The kind of a row; `None` where what would tell is missing."""
        if self._column is not None:
            return self._kind_of_column(row, self._column)
        if "input_ids" in row:
            return None if row["input_ids"] is None else TOKENS
        for name in CHATS:
            if isinstance(row.get(name), (list, tuple, np.ndarray)):
                return CHAT
        for question, answer in QUESTIONS.items():
            if question in row and answer in row:
                return CHAT
        if any(row.get(name, "") is None for name in ("text", *CHATS)):
            # A title does not stand in for the text that this row lacks.
            return None
        strings = [name for name, value in row.items() if isinstance(value, str)]
        if "text" in row or len(strings) == 1:
            self._column = "text" if "text" in row else strings[0]
            return self._kind_of_column(row, self._column)
        if not strings and any(value is None for value in row.values()):
            return None
        raise ValueError(
            f"{self.name} has the columns {', '.join(map(str, row))}; name one of text or messages as dataset_column."
        )

    def _kind_of_column(self, row: Mapping, column: str) -> str | None:
        if column not in row:
            raise ValueError(
                f"{self.name} has no column {column!r}; it has the columns {', '.join(map(str, row))}. Name one of "
                f"text or messages as dataset_column."
            )
        value = row[column]
        if isinstance(value, str):
            return TEXT
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return None
        if _holds_numbers(value):
            return TOKENS
        if isinstance(value, (list, tuple, np.ndarray)):
            return CHAT
        raise ValueError(
            f"{self.name} has a {type(value).__name__} in the column {column}; name one of text or messages as "
            f"dataset_column."
        )

    def _items(self, row: Mapping) -> Iterable[Any]:
        if self.kind == CHAT:
            return [chat_of(row, self._column)]
        if self.kind == TOKENS:
            return tokens_of(row, self._column or "input_ids")
        assert self._column is not None
        text = row.get(self._column)
        if not isinstance(text, str):
            raise UnusableRow(f"{self._column} is {_described(text)}, not a text")
        return [text]

    def _leave_out(self, number: int, reason: UnusableRow) -> None:
        self._left_out += 1
        if self._left_out == 1:
            self._first_reason = f"The first of them is row {number}, counted from 0: {reason}."
        if not self._used and self._left_out >= GIVE_UP:
            self.report()


def tokens_of(row: Mapping, column: str = "input_ids") -> Iterator[Tokens]:
    """Yield the sequences of a row: one, or where it is a padded batch `[sequences, tokens]` as many.

    Raises:
        UnusableRow: where there are no token ids, or a mask or labels of another length.
    """
    mask = labels = None
    input_ids = _numbers(row, column, may_be_bool=False)
    # A row with several columns of token ids has the mask and the labels of the one with the usual name.
    if column == "input_ids" or "input_ids" not in row:
        mask, labels = (_numbers(row, name) for name in ("attention_mask", "labels"))
    if input_ids is None or not input_ids.size:
        raise UnusableRow(f"{column} is empty")
    for name, values in (("attention_mask", mask), ("labels", labels)):
        if values is not None and values.shape != input_ids.shape:
            raise UnusableRow(f"{name} has the shape {list(values.shape)} and {column} {list(input_ids.shape)}")
    width = input_ids.shape[-1]
    table = input_ids.reshape(-1, width)
    masks = np.ones(table.shape, dtype=bool) if mask is None else mask.reshape(-1, width) != 0
    for number in range(len(table)):
        yield Tokens(table[number], masks[number], None if labels is None else labels.reshape(-1, width)[number])


def _numbers(row: Mapping, name: str, may_be_bool: bool = True) -> np.ndarray | None:
    """A column as int64; `None` where it is missing."""
    values = row.get(name)
    if values is None:
        return None
    try:
        array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UnusableRow(f"{name} has rows of different lengths") from error
    if array.size and (array.dtype.kind not in ("iub" if may_be_bool else "iu") or array.ndim not in (1, 2)):
        raise UnusableRow(f"{name} has no list of whole numbers")
    return array.astype(np.int64)


def _holds_numbers(value: Any) -> bool:
    """Whether a value is a tensor, an array or a list of whole numbers, or of such lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return False
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _empty_columns(row: Mapping) -> str:
    return ", ".join(str(name) for name, value in row.items() if value is None or value == []) or "the row"


def _described(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
