"""Mixtures of several sources of training data, each with a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..data.texts import BUILTIN, FILE_LOADERS, PRESETS, SELF
from ..words import public_name
from .amounts import Wanted
from .self_written import SelfWritten


# A name of a source with its weight, such as chats.jsonl:0.5.
_WEIGHTED = re.compile(r"(?P<name>.+?)(?::(?P<weight>\d+(?:\.\d+)?))?")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

_NUMBERS = List(Value("int32"))


@dataclass(frozen=True)
class Mixture:
    """Several sources of training data; the tokens of the mixture are divided among them by their weights.

    Args:
        sources (sequence): the sources, as [`training_data`] takes them.
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
        matches = [_WEIGHTED.fullmatch(str(part)) if isinstance(part, (str, Path)) else None for part in source]
        if not all(match is not None and _is_name(match["name"]) for match in matches):
            return None
        return cls(
            [match["name"] for match in matches if match],
            [float(match["weight"] or 1) for match in matches if match],
        )

    def __str__(self) -> str:
        names = (public_name(str(part)) if _is_named(part) else "data in memory" for part in self.sources)
        total = sum(self.weights)
        return ", ".join(f"{name} ({weight / total:.0%})" for name, weight in zip(names, self.weights))

    def replaced(self, old: Any, new: Any) -> Mixture:
        """Return the mixture with another source in the place of those that are equal to `old`."""
        return Mixture([new if isinstance(part, str) and part == old else part for part in self.sources], self.weights)

    def read(self, wanted: Wanted, length: int, read: Callable[[Any, Wanted], Dataset]) -> Dataset:
        """Return the sequences of all sources. They have as many tokens as the source that ends first allows.

        Args:
            wanted (`Wanted`): how much to read.
            length (`int`): tokens of a sequence.
            read (`Callable`): reads as much of a source as is wanted.
        """
        total = math.inf if wanted.tokens is None else float(wanted.tokens)
        if wanted.sequences is not None:
            total = min(total, wanted.sequences * length)
        shares = [weight / sum(self.weights) for weight in self.weights]
        # Text that the teacher writes never ends, so that the others determine the size.
        order = sorted(range(len(shares)), key=lambda place: isinstance(self.sources[place], SelfWritten))
        parts: dict[int, Dataset] = {}
        for place in order:
            few = Wanted(tokens=math.ceil(shares[place] * total)) if math.isfinite(total) else Wanted()
            parts[place] = read(self.sources[place], few)
            total = min(total, _tokens_of(parts[place]) / shares[place])
        return _joined([_first(parts[place], shares[place] * total) for place in range(len(shares))])


def _is_named(source: Any) -> bool:
    return isinstance(source, (str, Path, SelfWritten))


def _is_name(text: str) -> bool:
    """Return whether a string is the name of a source, and not a text."""
    if text in (*PRESETS, BUILTIN, SELF):
        return True
    if "\n" in text:
        return False
    return Path(text).suffix in FILE_LOADERS or bool(_REPOSITORY.fullmatch(text))


def _tokens_of(data: Dataset) -> int:
    return sum(len(row) for row in data.with_format("numpy")["input_ids"])


def _first(data: Dataset, tokens: float) -> Dataset:
    """Return the first sequences, up to a number of tokens; at least one."""
    count, read = 0, 0
    for row in data.with_format("numpy")["input_ids"]:
        # A share of a whole number of tokens may be off by rounding.
        if count and read + 0.5 > tokens:
            break
        count, read = count + 1, read + len(row)
    return data.select(range(count))


def _joined(parts: list[Dataset]) -> Dataset:
    """Return the sequences of several datasets as one, with the mask that some of them have."""
    optional = ("attention_mask", "position_ids")
    present = [name for name in optional if any(name in part.column_names for part in parts)]
    names = ["input_ids", "labels", *present]
    features = Features(dict.fromkeys(names, _NUMBERS))
    whole = []
    for part in parts:
        columns = {name: part[name] for name in names if name in part.column_names}
        for name in present:
            if name not in columns:
                values = np.arange if name == "position_ids" else np.ones  # type: ignore[assignment]
                columns[name] = [values(len(row), dtype=np.int32) for row in part["input_ids"]]  # type: ignore[operator]
        whole.append(Dataset.from_dict(columns, features=features))
    return concatenate_datasets(whole)
