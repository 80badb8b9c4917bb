"""Reading mixtures of several sources of training data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..data.mixtures import Mixture
from .amounts import Wanted
from .self_written import SelfWritten


_NUMBERS = List(Value("int32"))


def read_mixture(mixture: Mixture, wanted: Wanted, length: int, read: Callable[[Any, Wanted], Dataset]) -> Dataset:
    """Return the sequences of all sources. They have as many tokens as the source that ends first allows.

    Args:
        mixture (`Mixture`): the sources with their weights.
        wanted (`Wanted`): how much to read.
        length (`int`): tokens of a sequence.
        read (`Callable`): reads as much of a source as is wanted.
    """
    total = math.inf if wanted.tokens is None else float(wanted.tokens)
    if wanted.sequences is not None:
        total = min(total, wanted.sequences * length)
    shares, sources = mixture.shares, mixture.sources
    # Text that the teacher writes never ends, so that the others determine the size.
    order = sorted(range(len(shares)), key=lambda place: isinstance(sources[place], SelfWritten))
    parts: dict[int, Dataset] = {}
    for place in order:
        few = Wanted(tokens=math.ceil(shares[place] * total)) if math.isfinite(total) else Wanted()
        parts[place] = read(sources[place], few)
        total = min(total, _tokens_of(parts[place]) / shares[place])
    return _joined([_first(parts[place], shares[place] * total) for place in range(len(shares))])


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
