"""How much of the data is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


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

    def of_length(self, length: int) -> int | None:
        """Return the number of sequences of one length that are wanted; `None` for all."""
        limits = [] if self.sequences is None else [self.sequences]
        limits += [] if self.tokens is None else [-(-self.tokens // length)]
        return min(limits, default=None)
