"""Texts and rows of data wherever they are: files, datasets of the Hub or in memory, strings."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


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
            the Hub, a `datasets.Dataset` or another iterable with `column_names`, or a list of strings or of mappings.
        config (`str`, *optional*): configuration name of a Hub dataset.
        split (`str`, defaults to `"train"`): split of a Hub dataset.

    Raises:
        ValueError: where the source is not understood, or empty.
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
    if isinstance(source, Sequence) and all(isinstance(text, str) for text in source):
        return "strings", [{"text": text} for text in source]
    if isinstance(source, Sequence) and all(isinstance(row, dict) for row in source):
        return "rows", source
    if hasattr(source, "column_names") or hasattr(source, "features"):
        return "dataset", source
    raise ValueError(
        f"Cannot read a {type(source).__name__}. Give a name, a file, a list of strings or a datasets.Dataset."
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
    if seed is not None and isinstance(source, str) and name == source and name != BUILTIN:
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


def _file_rows(path: Path) -> Iterable[dict]:
    from datasets import load_dataset

    if path.suffix not in FILE_LOADERS:
        raise ValueError(f"{path} must end in one of {', '.join(FILE_LOADERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    # It takes names for patterns, and `data[1].jsonl` is how browsers name a second download.
    literal = glob.escape(str(path.absolute()))
    return load_dataset(FILE_LOADERS[path.suffix], data_files=literal, split="train", streaming=True)


def _shuffled(rows: Any, seed: int) -> Any:
    from datasets import Dataset

    # A stream shuffles within a buffer, a dataset on disk as a whole.
    return rows.shuffle(seed=seed) if isinstance(rows, Dataset) else rows.shuffle(seed=seed, buffer_size=1000)


def _column_texts(rows: Iterable[dict], column: str | None, source: str, separator: str) -> Iterator[str]:
    for row in rows:
        if column is None:
            strings = [name for name, value in row.items() if isinstance(value, str)]
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
