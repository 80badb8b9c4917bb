"""How much of the data is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .arguments import RecoveryArguments
from .budgets import tokens_of


@dataclass(frozen=True)
class Wanted:
    """How much of the data is read, so that a stream is not read further.

    Args:
        sequences (`int`, *optional*): largest number of sequences; by default all.
        tokens (`int`, *optional*): number of tokens after which reading stops; by default all are read.
    """

    sequences: int | None = None
    tokens: int | None = None

    def taken(self, sequences: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield as many of the sequences, which have `input_ids`, as are wanted."""
        read = 0
        for number, sequence in enumerate(sequences, start=1):
            yield sequence
            read += len(sequence["input_ids"])
            if self.is_met(number, read):
                return

    def is_met(self, sequences: int, tokens: int) -> bool:
        """Return whether no more is wanted than these numbers of sequences and tokens."""
        enough_sequences = self.sequences is not None and sequences >= self.sequences
        return enough_sequences or (self.tokens is not None and tokens >= self.tokens)

    def times(self, share: float) -> Wanted:
        """Return this share of the sequences and of the tokens."""
        sequences, tokens = (
            None if number is None else math.ceil(share * number) for number in (self.sequences, self.tokens)
        )
        return Wanted(sequences, tokens)

    def of_length(self, length: int) -> int | None:
        """Return the number of sequences of one length that are wanted; `None` for all."""
        limits = [] if self.sequences is None else [self.sequences]
        limits += [] if self.tokens is None else [-(-self.tokens // length)]
        return min(limits, default=None)


def wanted_by(args: RecoveryArguments, held_out: float | None) -> Wanted:
    """Return how much of the data `max_steps` or `tokens` read; all of it where neither is set.

    Args:
        args (`RecoveryArguments`): these arguments, and the batch sizes.
        held_out (`float`, *optional*): share of the sequences that is held out; they are read in addition.
    """
    more = 1 / (1 - (held_out or 0.0))
    if args.max_steps > 0:
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return Wanted(sequences=math.ceil(more * args.max_steps * per_step))
    if args.tokens is not None:
        return Wanted(tokens=math.ceil(more * tokens_of(args.tokens)))
    return Wanted()


def held_out_evenly(count: int, share: float | None) -> tuple[list[int], list[int]]:
    """Return the indices of sequences to train on, and of those that are held out, which are evenly spread.

    Args:
        count (`int`): number of sequences.
        share (`float`, *optional*): share of the sequences to hold out; by default none.

    Raises:
        ValueError: where there are too few sequences to hold one out.
    """
    if share is None:
        return list(range(count)), []
    if count < 2:
        raise ValueError(
            f"held_out={share} holds sequences of the training data out, and there is {count} of them. Train on more "
            f"text, lower max_length, or pass an eval_dataset."
        )
    every = max(2, round(1 / share))
    held_out = list(range(every - 1, count, every)) or [count - 1]
    return sorted(set(range(count)) - set(held_out)), held_out
