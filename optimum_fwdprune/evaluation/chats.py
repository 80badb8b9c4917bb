"""Perplexity of the answers in chats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.positions import check_length, positions_of
from ..data.answers import Answers
from ..data.chats import IGNORED
from ..data.rows import CHAT, Data
from ..data.texts import KINDS, open_rows, texts_in
from ..forward.losses import model_nll
from ..loading.state import evaluating
from ..runs.progress import progress
from .perplexity import TextLoss


# Tokens per chat by default.
MAX_LENGTH = 2048


@dataclass(frozen=True)
class ChatRows:
    """Rows of chats, which are read again for every model.

    Args:
        name (`str`): their name, for messages.
        rows (`list[Mapping]`): the rows, in any form that recovery reads, such as `{"messages": [...]}`.
        column (`str`, *optional*): the column of the messages; by default it is detected.
    """

    name: str
    rows: list[Mapping]
    column: str | None = None

    @classmethod
    def of(cls, name: str, source: Any) -> ChatRows:
        """Return the rows of chats in memory.

        Raises:
            ValueError: where the source holds something else.
        """
        rows = cls(name, list(open_rows(source)[1]))
        kind = rows.opened().kind
        if kind != CHAT:
            raise ValueError(f"{name} is neither strings nor chats: its rows hold {KINDS.get(kind, kind)}.")
        return rows

    def opened(self) -> Data:
        """Return the rows to read once."""
        return Data(self.name, self.rows, self.column)


def open_texts_or_chats(
    source: Any, config: str | None = None, split: str = "train", column: str | None = None
) -> tuple[str, list[str] | ChatRows]:
    """Return a name for a source, and its texts or its chats. The arguments are those of
    [`~optimum_fwdprune.data.texts.open_texts`]."""
    name, rows = open_rows(source, config, split)
    opened = ChatRows(name, list(rows), column)
    data = opened.opened()
    return name, opened if data.kind == CHAT else list(texts_in(data, source))


@torch.no_grad()
def chats_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: ChatRows | Iterable[Any],
    max_length: int | None = None,
    batch_size: int = 4,
) -> TextLoss:
    """Return the loss of `model` on the assistant's answers in chats, as the tokenizer's chat template writes them.

    Every answer is predicted from the messages before it. Only its tokens count, with those that the template writes
    to end it.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer. Without a chat template, messages are paragraphs.
        chats (`ChatRows` or iterable): chats as lists of messages, or rows of them. Those without an answer are left
            out, and a warning counts them.
        max_length (`int`, *optional*): tokens of the longest chat, whose other tokens are cut off, which a warning
            counts; by default 2048, or the model's number of positions if that is smaller.
        batch_size (`int`, defaults to 4): chats per forward pass.

    Raises:
        ValueError: where no chat has an answer, or `max_length` is more than the model's number of positions.
    """
    length = min(MAX_LENGTH, positions_of(model.config) or MAX_LENGTH) if max_length is None else max_length
    check_length(length, model.config)
    if length < 2 or batch_size < 1:
        raise ValueError(f"max_length must be at least 2 and batch_size at least 1; got {length} and {batch_size}.")
    rows = chats if isinstance(chats, ChatRows) else ChatRows.of("chats", chats)
    answers = Answers(rows.opened(), tokenizer, length)
    # Sequences of similar lengths are in one batch, so that little is padded.
    sequences = sorted(answers, key=lambda sequence: len(sequence[0]))
    answers.report("measured")
    total = TextLoss(0.0, 0)
    batches = [sequences[place : place + batch_size] for place in range(0, len(sequences), batch_size)]
    with evaluating(model):
        for batch in progress(batches, "Measuring perplexity", unit="batch"):
            ids, labels = (
                pad_sequence(list(map(torch.tensor, column)), batch_first=True, padding_value=filling)
                for column, filling in zip(zip(*batch), (0, IGNORED))
            )
            lengths = torch.tensor([len(own) for own, _ in batch])
            present = torch.arange(ids.shape[1]) < lengths[:, None]
            sums, counts = model_nll(model, ids, present.long(), answers=labels != IGNORED)
            total += TextLoss(float(sums.sum()), int(counts.sum()))
    return total
