"""The answers of chats as tokens, cut to a length; chats without an answer that counts are left out and counted."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from ..runs.loggers import get_logger
from .chats import IGNORED, check_template, encoded_chat
from .messages import Chat, UnusableRow
from .rows import Data


logger = get_logger(__name__)

Sequence = tuple[list[int], list[int]]


class Answers:
    """Token sequences of chats, with labels of which only those of the assistant's tokens count.

    Args:
        data (`Data`): chats.
        tokenizer (`PreTrainedTokenizerBase`): tokenizes them, by its chat template if it has one.
        length (`int`): number of tokens of the longest sequence; tokens after them are cut off.

    Raises:
        ValueError: where the tokenizer has several chat templates and none of them is the default.
    """

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, length: int):
        check_template(tokenizer)
        self._data, self._tokenizer, self._length = data, tokenizer, length
        # For every chat that is used: the tokens of its answers, and how many of them are beyond the length.
        self._counted: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[Sequence]:
        """Yield tokens and labels; at least one label of every sequence counts. Call [`report`] after reading."""
        return self._data.converted(self._sequences_of)

    def report(self, what: str) -> None:
        """Warn of chats that were left out, and of answers that were cut.

        Args:
            what (`str`): what is not done with the tokens that were cut off, as a past participle.

        Raises:
            ValueError: where no chat was used.
        """
        self._data.report()
        if cut := sum(1 for _, beyond in self._counted if beyond):
            logger.warning(
                "%d of %d chats of %s are longer than max_length=%d tokens. They are cut to this length, so that %d "
                "of the %d tokens of all answers are not %s. Raise max_length to keep them.",
                cut,
                len(self._counted),
                self._data.name,
                self._length,
                sum(beyond for _, beyond in self._counted),
                sum(total for total, _ in self._counted),
                what,
            )

    def _sequences_of(self, chat: Chat) -> list[Sequence]:
        encoded, length = encoded_chat(chat, self._tokenizer), self._length
        # The first token is never predicted.
        total = sum(_number_of(labels[1:]) for _, labels in encoded)
        kept = sum(_number_of(labels[1:length]) for _, labels in encoded)
        if not total:
            raise UnusableRow("the chat template marks no token of it as the assistant's")
        if not kept:
            raise UnusableRow(f"it has no answer of the assistant within its first max_length={length} tokens")
        self._counted.append((total, total - kept))
        return [(ids[:length], labels[:length]) for ids, labels in encoded if _number_of(labels[1:length])]


def _number_of(labels: list[int]) -> int:
    """Return how many labels count."""
    return sum(label != IGNORED for label in labels)
