"""Texts and rows of data wherever they are: files, datasets of the Hub or in memory, strings."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


PRESETS = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {"path": "allenai/c4", "name": "en"},
}
BUILTIN = "builtin"
FILE_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_rows(source: Any, config: str | None = None, split: str = "train") -> tuple[str, Iterable[dict]]:
    """Return a name for a source of data, and its rows; files and datasets of the Hub are streamed.

    Args:
        source: `wikitext2`, `c4`, `builtin` (Python's documentation), a .txt, .jsonl or .parquet file, a dataset of
            the Hub, a `datasets.Dataset` or another iterable with `column_names`, a `DatasetDict`, a `DataFrame` or
            `Series` of pandas, or a list of strings or of mappings.
        config (`str`, *optional*): configuration name of a Hub dataset.
        split (`str`, defaults to `"train"`): split of a Hub dataset or of a `DatasetDict`.

    Raises:
        ValueError: where the source is not understood, or empty, or has no such split; while they are read, where
            a file's content is not what its name says.
        FileNotFoundError: where there is no such file.
    """
    if isinstance(source, (str, Path)):
        if source == BUILTIN:
            return BUILTIN, _builtin_rows()
        if source in PRESETS:
            return str(source), load_rows(**PRESETS[str(source)], split=split)
        path = Path(source)
        if path.suffix in FILE_LOADERS or path.exists():
            return path.name, _file_rows(path)
        return str(source), load_rows(str(source), config, split)
    if holds_splits(source):
        if split not in source:
            raise ValueError(
                f"The dataset has no split {split!r}; it has {', '.join(map(str, source))}. Name one as dataset_split."
            )
        source = source[split]
    elif hasattr(source, "iterrows") or hasattr(source, "to_frame"):
        source = _pandas_rows(source)
    elif isinstance(source, np.ndarray):
        source = source.tolist()
    if isinstance(source, Sequence) and all(isinstance(text, str) for text in source):
        return "strings", [{"text": text} for text in source]
    if isinstance(source, Sequence) and all(isinstance(row, dict) for row in source):
        return "rows", source
    if hasattr(source, "column_names") or hasattr(source, "features"):
        return "dataset", source
    raise ValueError(
        f"Cannot read a {type(source).__name__}. Give a name, a file, a list of strings or a datasets.Dataset."
    )


def holds_splits(source: Any) -> bool:
    """Whether a source is a mapping of datasets, of which `split` names one."""
    return (
        isinstance(source, Mapping) and bool(source) and all(hasattr(each, "column_names") for each in source.values())
    )


def open_texts(
    source: Any,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
    seed: int | None = None,
) -> tuple[str, Iterator[str]]:
    """Return a name for a source and its texts, each ending where the next may be joined to it.

    Args:
        source, config, split: see [`open_rows`].
        column (`str`, *optional*): column of the text; by default `text`, or the only column of strings.
        seed (`int`, *optional*): shuffle a dataset of the Hub; files and what is in memory stay in order.
    """
    name, rows = open_rows(source, config, split)
    # Of what has a name, only datasets of the Hub can shuffle.
    if seed is not None and isinstance(source, str) and hasattr(rows, "shuffle"):
        rows = _shuffled(rows, seed)
    # Lines of a text file are its own; rows are texts apart from each other.
    separator = "\n" if isinstance(source, (str, Path)) and str(source).endswith(".txt") else "\n\n"
    return name, _column_texts(rows, column, name, separator)


def load_rows(path: str, name: str | None = None, split: str = "train") -> Any:
    """Open a dataset of the Hub: streamed, never downloaded whole; offline, its cached copy."""
    from datasets import load_dataset
    from huggingface_hub import is_offline_mode

    return load_dataset(path, name, split=split, streaming=not is_offline_mode())


def detokenize(text: str) -> str:
    """Undo the marks of tokenised WikiText (`<unk>`, ` @-@ `), which no model met in its own training text."""
    return re.sub(r" ?<unk>", "", re.sub(r" @([-,.])@ ", r"\1", text))


def _pandas_rows(frame: Any) -> Any:
    from datasets import Dataset

    if hasattr(frame, "to_frame"):
        frame = frame.to_frame("text")
    # Not `to_dict`, where a text that is missing would be a number, NaN.
    return Dataset.from_pandas(frame, preserve_index=False)


def _file_rows(path: Path) -> Iterable[dict]:
    if path.suffix not in FILE_LOADERS:
        raise ValueError(f"{path} must end in one of {', '.join(FILE_LOADERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    return _read_rows(path)


def _read_rows(path: Path) -> Iterator[dict]:
    from datasets import load_dataset

    # It takes names for patterns, and `data[1].jsonl` is how browsers name a second download.
    literal = glob.escape(str(path.absolute()))
    try:
        yield from load_dataset(FILE_LOADERS[path.suffix], data_files=literal, split="train", streaming=True)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8: it holds the byte {byte:#04x} where none can be. Save it as UTF-8."
        ) from error
    # Whatever Arrow makes of malformed files says at which row, but not of which file.
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _shuffled(rows: Any, seed: int) -> Any:
    from datasets import Dataset

    # A stream shuffles within a buffer, a dataset on disk as a whole.
    return rows.shuffle(seed=seed) if isinstance(rows, Dataset) else rows.shuffle(seed=seed, buffer_size=1000)


def _column_texts(rows: Iterable[dict], column: str | None, source: str, separator: str) -> Iterator[str]:
    for row in rows:
        if column is None:
            strings = [name for name, value in row.items() if isinstance(value, str)]
            if ("text" in row and row["text"] is None) or (not strings and None in row.values()):
                # What is missing here may be there in the next row.
                continue
            column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
        if column is None or column not in row:
            raise ValueError(f"{source} has the columns {', '.join(row)}; name one of text as dataset_column.")
        if row[column] is None:
            # A row of no text, as data that was gathered has them.
            continue
        if not isinstance(row[column], str):
            raise ValueError(
                f"{source} has a {type(row[column]).__name__} in the column {column}; name one of text as "
                f"dataset_column."
            )
        yield row[column] + separator


def _builtin_rows() -> Iterator[dict]:
    from pydoc_data.topics import topics

    return ({"text": topics[name]} for name in sorted(topics))
