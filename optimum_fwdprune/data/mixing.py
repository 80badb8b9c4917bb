"""Shuffling the rows of a stream, of which only a small part is read and held at a time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


# Rows that are held at most; more of them hardly change the order any further.
ROWS = 1000


@dataclass(frozen=True)
class Mixing:
    """How the rows of a stream are shuffled: a buffer is filled, and then every new row replaces a random one.

    Args:
        seed (`int`): the seed, which determines the order.
        characters (`int`): number of characters that the buffer holds at most, beside one row. Rows of some datasets
            are whole books, of which a fixed number could fill the memory.
    """

    seed: int
    characters: int

    def mixed(self, rows: Iterable[Mapping]) -> Iterator[Mapping]:
        """Yield the rows in random order."""
        chosen = random.Random(self.seed)
        buffer: list[tuple[Mapping, int]] = []
        held = 0
        for row in rows:
            buffer.append((row, _size_of(row)))
            held += buffer[-1][1]
            while len(buffer) > ROWS or held > self.characters:
                place = chosen.randrange(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                taken, size = buffer.pop()
                held -= size
                yield taken
        chosen.shuffle(buffer)
        for row, _ in buffer:
            yield row


def _size_of(value: Any) -> int:
    """Return the number of characters, bytes and other items of a row."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_size_of, value))
    return getattr(value, "size", 1) if isinstance(getattr(value, "size", 1), int) else 1
