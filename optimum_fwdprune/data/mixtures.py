"""Mixtures of several sources of data, each with a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..words import name_and_weight, public_name
from .texts import BUILTIN, FILE_LOADERS, PRESETS, SELF


_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Mixture:
    """Several sources of data; the tokens of the mixture are divided among them by their weights.

    Args:
        sources (sequence): the sources: names, or data in memory.
        weights (sequence of `float`): a weight per source; only their ratios matter.

    Raises:
        ValueError: where there are no sources, or a weight is not above 0.
    """

    sources: Sequence[Any]
    weights: Sequence[float]

    def __post_init__(self):
        if not self.sources or len(self.sources) != len(self.weights):
            raise ValueError(
                f"A Mixture has a weight for every source; got {len(self.sources)} sources and {len(self.weights)} "
                f"weights."
            )
        wrong = [weight for weight in self.weights if not (weight > 0 and math.isfinite(weight))]
        if wrong:
            raise ValueError(f"The weight of a source must be above 0; got {wrong[0]}. Leave the source out.")

    @classmethod
    def of(cls, source: Any) -> Mixture | None:
        """Return a list of names of sources, such as `["wikitext2", "chats.jsonl:0.5"]`, as a mixture; `None` for
        anything else, such as a list of texts."""
        if isinstance(source, Mixture):
            return source
        if not isinstance(source, (list, tuple)) or not source:
            return None
        return cls.of_names(source) if all(map(_is_name, source)) else None

    @classmethod
    def of_names(cls, names: Iterable[Any]) -> Mixture:
        """Return a mixture of the sources with these names, each with `:WEIGHT` if it is not 1.

        Raises:
            ValueError: where one of them is no name of a source.
        """
        names = list(names)
        for name in names:
            if not _is_name(name):
                raise ValueError(
                    f"{name!r} is no source of data in a mixture; name a file ({', '.join(FILE_LOADERS)}), "
                    f"{', '.join(PRESETS)}, {BUILTIN}, {SELF} or a dataset of the Hub, each with :WEIGHT if it is not "
                    f"1."
                )
        pairs = [name_and_weight(str(name)) for name in names]
        return cls([name for name, _ in pairs], [1.0 if weight is None else weight for _, weight in pairs])

    def __str__(self) -> str:
        return ", ".join(f"{_name_of(part)} ({share:.0%})" for part, share in zip(self.sources, self.shares))

    @property
    def shares(self) -> list[float]:
        """The weights, divided by their sum."""
        total = sum(self.weights)
        return [weight / total for weight in self.weights]

    def replaced(self, old: Any, new: Any) -> Mixture:
        """Return the mixture with another source in the place of those that are equal to `old`."""
        return Mixture([new if isinstance(part, str) and part == old else part for part in self.sources], self.weights)

    def without(self, name: str) -> tuple[Mixture | None, float]:
        """Return the mixture without the source of a name, and the share of the tokens that is left to it; `None`
        where no other source is left."""
        left = [
            (part, weight)
            for part, weight in zip(self.sources, self.weights)
            if not (isinstance(part, str) and part == name)
        ]
        if not left:
            return None, 0.0
        sources, weights = zip(*left)
        return Mixture(sources, weights), sum(weights) / sum(self.weights)

    def divided(self, count: int) -> list[int]:
        """Return how many of `count` windows every source has: by largest remainder, and at least one.

        Raises:
            ValueError: where there are more sources than windows.
        """
        if count < len(self.sources):
            raise ValueError(
                f"A mixture of {len(self.sources)} sources needs as many windows; n_samples is {count}. Raise it, or "
                f"leave sources out."
            )
        exact = [share * count for share in self.shares]
        counts = [max(1, math.floor(value)) for value in exact]
        while sum(counts) != count:
            step = 1 if sum(counts) < count else -1
            # The source that is furthest from its share changes. No source loses its last window.
            places = [place for place in range(len(counts)) if step > 0 or counts[place] > 1]
            counts[max(places, key=lambda place: step * (exact[place] - counts[place]))] += step
        return counts


def _is_name(part: Any) -> bool:
    """Return whether a value is the name of a source, which may have a weight, and not a text."""
    if not isinstance(part, (str, Path)):
        return False
    name, _ = name_and_weight(str(part))
    if name in (*PRESETS, BUILTIN, SELF):
        return True
    return "\n" not in name and (Path(name).suffix in FILE_LOADERS or bool(_REPOSITORY.fullmatch(name)))


def _name_of(part: Any) -> str:
    """Return the name of a source, without a path of this machine. Data in memory may have it as `source`."""
    return public_name(str(part)) if isinstance(part, (str, Path)) else getattr(part, "source", "data in memory")
