"""Rows of data in memory: from mappings of columns, pandas, and items of lists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .messages import is_message, refusing_all
from .tokens import check_table


# Columns that hold a number per token.
TOKEN_COLUMNS = {"input_ids", "attention_mask", "labels"}

# Formats of datasets whose rows are tables.
TABLES = ("arrow", "pandas", "polars")


def rows_of_columns(columns: Mapping) -> list[dict]:
    """Return the rows of a mapping of columns, such as a tokenizer returns for one text or for several."""
    if any(isinstance(values, list) and values and all(map(is_message, values)) for values in columns.values()):
        # The mapping is a row with a chat, and not one of columns.
        return [dict(columns)]
    _check_columns(columns)
    # A tokenizer may return no mask.
    columns = {name: values for name, values in columns.items() if values is not None}
    for name in TOKEN_COLUMNS & columns.keys():
        with refusing_all():
            check_table(columns[name], name)
    lengths = {name: len(values) for name, values in columns.items()}
    ids = columns.get("input_ids")
    if ids is not None and lengths["input_ids"] and getattr(ids, "ndim", 1) == 1 and not hasattr(ids[0], "__len__"):
        return [columns]
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"The columns have different lengths: {counts}.")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _check_columns(columns: Mapping) -> None:
    """Raise `ValueError` where a mapping has no columns, or a column is no list."""
    reasons = [
        f"whose column {name!r} is a {type(values).__name__}"
        for name, values in columns.items()
        if values is not None and (isinstance(values, (str, bytes)) or not hasattr(values, "__len__"))
    ]
    if not columns:
        reasons = ["that has no columns"]
    elif all(values is None for values in columns.values()):
        reasons = [f"whose columns are None: {', '.join(map(str, columns))}"]
    if reasons:
        raise ValueError(
            f"Cannot read a dict {reasons[0]}; pass a mapping of columns to lists of equal lengths, or a list of rows."
        )


def row_of(value: Any) -> Mapping:
    """Return an item of a list or generator as a row."""
    if isinstance(value, Mapping):
        return {name: None if _is_missing(entry) else entry for name, entry in value.items()}
    if isinstance(value, (list, tuple)) and value and all(isinstance(message, Mapping) for message in value):
        return {"messages": value}
    if isinstance(value, (list, tuple)) and value and all(getattr(part, "ndim", 0) for part in value):
        if len(value) > 1:
            raise ValueError(
                f"A row is {len(value)} tensors without names; pass mappings with input_ids, and with attention_mask "
                f"or labels where there are some."
            )
        # PyTorch's TensorDataset returns tuples of one tensor.
        return {"input_ids": value[0]}
    if hasattr(value, "tolist") or isinstance(value, (list, tuple)):
        return {"input_ids": value}
    return {"text": value}


def _is_missing(value: Any) -> bool:
    """Return whether a value is one that pandas uses for missing values."""
    return (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in ("NAType", "NaTType")


def with_mappings(dataset: Any) -> Any:
    """Return a dataset whose rows are mappings, where its format makes them tables of pandas, polars or Arrow."""
    streaming = getattr(dataset, "_formatting", None)
    if getattr(streaming, "format_type", None) in TABLES:
        return dataset.with_format(None)
    chosen = getattr(dataset, "format", None)
    if isinstance(chosen, Mapping) and chosen.get("type") in TABLES:
        return dataset.with_format(None, columns=chosen["columns"])
    return dataset


def rows_of_pandas(frame: Any) -> Any:
    from datasets import Dataset

    if hasattr(frame, "to_frame"):
        frame = frame.to_frame("text")
    # `to_dict` would turn a missing text into a number, NaN.
    return Dataset.from_pandas(frame, preserve_index=False)
