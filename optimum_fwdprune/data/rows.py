"""Rows of data, which hold text, chats or tokens. Rows that cannot be used are left out and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from ..runs.loggers import get_logger
from .messages import (
    CHATS,
    LIST_OF_MESSAGES,
    QUESTIONS,
    UnusableRow,
    chat_of,
    messages_in,
)
from .tokens import tokens_of


logger = get_logger(__name__)

# Kinds of rows.
TEXT, CHAT, TOKENS = "text", "chat", "tokens"

# After this number of rows without a usable one, reading stops: a stream may have no end.
GIVE_UP = 1000

T = TypeVar("T")


class Data:
    """Rows of one kind, which is that of the first usable row.

    A row has tokens if it has a column `input_ids`; a chat if it has `messages`, `conversation` or `conversations`, or
    `prompt` and `completion`, `instruction` and `output`, or `question` and `answer`; and otherwise text, in the
    column `text`, or in the only column of strings. A row that cannot be used, such as one whose text is null, is left
    out and counted.

    Args:
        name (`str`): name of the source, for messages.
        rows (`Iterable[Mapping]`): the rows.
        column (`str`, *optional*): the column of the text, the messages or the tokens; by default it is detected.

    Attributes:
        kind (`str`): `"text"`, `"chat"` or `"tokens"`.

    Raises:
        ValueError: where there are no rows, where none of them can be used, or where the column of the data cannot be
            detected; the message lists all columns.
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
        """Yield the results of `convert` for every row, which is passed as a `str`, a `Chat` or `Tokens`.

        A row for which `convert` raises `UnusableRow` is left out. Call [`report`] after reading.
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
                f"None of {self._left_out} rows of {self.name} can be used. {self._first_reason} Set dataset_column "
                f"to use another column."
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
        """Return the kind of the rows, and the number and content of the first usable one."""
        for number, row in self._rows:
            kind = self._kind_of(row)
            if kind is not None:
                return kind, (number, row)
            self._leave_out(number, UnusableRow(f"{_empty_columns(row)} is null or empty"))
        if self._left_out:
            self.report()
        raise ValueError(f"{self.name} is empty; it has no rows.")

    def _kind_of(self, row: Mapping) -> str | None:
        """Return the kind of a row; `None` where the columns that determine it are null or empty."""
        if self._column is not None:
            return self._kind_of_column(row, self._column)
        if "input_ids" in row:
            return None if row["input_ids"] is None else TOKENS
        for name in CHATS:
            value = row.get(name)
            if isinstance(value, (list, tuple, np.ndarray)):
                return CHAT
            if isinstance(value, str) and LIST_OF_MESSAGES.match(value):
                return CHAT
        for question, answer in QUESTIONS.items():
            if question in row and answer in row:
                return CHAT
        if any(row.get(name, "") is None for name in ("text", *CHATS)):
            # The text of this row is missing; another column, such as a title, must not be used instead.
            return None
        strings = [name for name, value in row.items() if isinstance(value, str)]
        if "text" in row or len(strings) == 1:
            self._column = "text" if "text" in row else strings[0]
            return self._kind_of_column(row, self._column)
        if not strings and any(value is None for value in row.values()):
            return None
        raise ValueError(
            f"{self.name} has the columns {', '.join(map(str, row))}. Set dataset_column to the one that holds "
            f"text or messages, or name a question and its answer question and answer."
        )

    def _kind_of_column(self, row: Mapping, column: str) -> str | None:
        if column not in row:
            raise ValueError(
                f"{self.name} has no column {column!r}; it has the columns {', '.join(map(str, row))}. Set "
                f"dataset_column to the one that holds text or messages."
            )
        value = row[column]
        if isinstance(value, str):
            return TEXT if messages_in(value) is None else CHAT
        if value is None or (isinstance(value, (list, tuple)) and not value):
            return None
        if _holds_numbers(value):
            return TOKENS
        if isinstance(value, (list, tuple, np.ndarray)):
            return CHAT
        raise ValueError(
            f"{self.name} has a {type(value).__name__} in the column {column}, which is neither text nor messages nor "
            f"a list of token ids; set dataset_column to another column."
        )

    def _items(self, row: Mapping) -> Iterable[Any]:
        if self.kind == CHAT:
            return [chat_of(row, self._column)]
        column = self._column or "input_ids"
        if column not in row:
            raise UnusableRow(f"it has no {column}; it has {', '.join(map(str, row)) or 'nothing'}")
        if self.kind == TOKENS:
            return tokens_of(row, column)
        text = row[column]
        if not isinstance(text, str):
            raise UnusableRow(f"{column} is {_described(text)}, not a text")
        return [text]

    def _leave_out(self, number: int, reason: UnusableRow) -> None:
        self._left_out += 1
        if self._left_out == 1:
            self._first_reason = f"The first of them is row {number}, counted from 0: {reason}."
        if not self._used and self._left_out >= GIVE_UP:
            self.report()


def _holds_numbers(value: Any) -> bool:
    """Return whether a value is a tensor, an array or a list of integers, or a list of such lists."""
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
