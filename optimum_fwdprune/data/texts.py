"""Texts and rows of data wherever they are: files, datasets of the Hub or in memory, strings."""

from __future__ import annotations

import codecs
import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..loading.offline import naming_offline
from .in_memory import row_of, rows_of_columns, rows_of_pandas
from .messages import is_message, refusing_all
from .rows import (
    CHAT,
    TEXT,
    TOKENS,
    Data,
)
from .tokens import check_table


PRESETS = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {"path": "allenai/c4", "name": "en"},
}
BUILTIN = "builtin"
# Text that the model writes itself, which calibration makes.
SELF = "self"
KINDS = {CHAT: "chats", TOKENS: "tokens"}
# Longer than names of files are, and those of datasets.
LONGEST_NAME = 4096
FILE_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_data(
    source: Any,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
    seed: int | None = None,
) -> Data:
    """Open a source of data: its rows as text, chats or tokens, those that cannot be used left out and counted.

    Args:
        source, config, split, seed: see [`open_rows`].
        column (`str`, *optional*): column of the text, the messages or the tokens; by default see `Data`.

    Raises:
        ValueError, FileNotFoundError: see [`open_rows`] and `Data`.
    """
    return Data(*open_rows(source, config, split, seed), column)


def open_rows(
    source: Any, config: str | None = None, split: str = "train", seed: int | None = None
) -> tuple[str, Iterable[Mapping]]:
    """Return a name for a source of data, and its rows; files and datasets of the Hub are streamed.

    Args:
        source: `wikitext2`, `c4`, `builtin` (Python's documentation), a .txt, .json, .jsonl or .parquet file, a
            dataset of the Hub, a `datasets.Dataset` or another iterable with `column_names`, a `DatasetDict`, a
            `DataFrame` or `Series` of pandas, a mapping of columns such as a tokenizer returns, a tensor or array of
            token ids, or a list, generator or other iterable of texts, of mappings, of chats (lists of messages) or of
            token ids.
        config (`str`, *optional*): configuration name of a Hub dataset.
        split (`str`, defaults to `"train"`): split of a Hub dataset or of a `DatasetDict`.
        seed (`int`, *optional*): shuffle a dataset of the Hub; files and what is in memory stay in order.

    Raises:
        ValueError: where the source is not understood, or has no such split; while they are read, where
            a file's content is not what its name says.
        OSError: where there is no such file or dataset, or the Hub cannot be reached.
    """
    if isinstance(source, (str, Path)):
        if source == BUILTIN:
            return BUILTIN, _builtin_rows()
        if source == SELF:
            raise ValueError(
                f"{SELF!r} is text that the model writes itself, which is for calibration alone; name a file (.txt, "
                f".json, .jsonl, .parquet), {BUILTIN!r} or a dataset of the Hub."
            )
        if source in PRESETS:
            return str(source), _shuffled(load_rows(**PRESETS[str(source)], split=split), seed)
        _check_name(str(source))
        path = Path(source)
        if path.suffix in FILE_LOADERS or path.exists():
            return path.name, _file_rows(path)
        return str(source), _shuffled(load_rows(str(source), config, split), seed)
    if holds_splits(source):
        if split not in source:
            raise ValueError(
                f"The dataset has no split {split!r}; it has {', '.join(map(str, source))}. Name one as dataset_split."
            )
        source = source[split]
    elif hasattr(source, "iterrows") or hasattr(source, "to_frame"):
        source = rows_of_pandas(source)
    elif hasattr(source, "tolist"):
        with refusing_all():
            check_table(source, "the data")
        source = source.tolist()
    elif isinstance(source, Mapping):
        source = rows_of_columns(source)
    if hasattr(source, "column_names") or hasattr(source, "features"):
        # A column of a dataset has these too, and holds no rows but what is in them.
        return "dataset", map(row_of, source)
    if isinstance(source, Sequence):
        if source and all(map(is_message, source)):
            source = [source]
        if source and all(isinstance(value, (int, np.integer)) for value in source):
            source = [source]
        strings = all(isinstance(text, str) for text in source)
        return "strings" if strings else "rows", map(row_of, source)
    if isinstance(source, Iterable):
        return "rows", map(row_of, source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, type):
        # PyTorch's datasets.
        return "rows", (row_of(source[number]) for number in range(len(source)))
    raise ValueError(
        f"Cannot read a {type(source).__name__}. Give a name, a file, texts, chats or token ids in a list, or a "
        f"datasets.Dataset."
    )


def holds_splits(source: Any) -> bool:
    """Whether a source is a mapping of datasets, of which `split` names one."""
    return (
        isinstance(source, Mapping) and bool(source) and all(hasattr(part, "column_names") for part in source.values())
    )


def open_texts(
    source: Any,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
    seed: int | None = None,
) -> tuple[str, Iterator[str]]:
    """Return a name for a source and its texts, each ending where the next may be joined to it.

    The arguments are those of [`open_data`].
    """
    data = open_data(source, config, split, column, seed)
    if data.kind != TEXT:
        raise ValueError(
            f"{data.name} holds {KINDS[data.kind]}, and text is needed; name its column as dataset_column."
        )
    return data.name, _reported(texts_of(data, source), data)


def texts_of(data: Data, source: Any) -> Iterator[str]:
    """Yield the texts of data, each ending where the next may be joined to it."""
    # Lines of a text file are its own; rows are texts apart from each other.
    separator = "\n" if isinstance(source, (str, Path)) and str(source).endswith(".txt") else "\n\n"
    return (text + separator for text in data)


def always_text(source: Any) -> bool:
    """Whether a source is known to hold text before it is opened."""
    return isinstance(source, (str, Path)) and (
        source in PRESETS or source == BUILTIN or Path(source).suffix == ".txt"
    )


def load_rows(path: str, name: str | None = None, split: str = "train") -> Any:
    """Open a dataset of the Hub: streamed, never downloaded whole; offline, its cached copy."""
    from datasets import load_dataset
    from huggingface_hub import is_offline_mode

    with naming_offline(path, "name a file (.txt, .json, .jsonl, .parquet), 'builtin', or for calibration 'self'"):
        return load_dataset(path, name, split=split, streaming=not is_offline_mode())


def detokenize(text: str) -> str:
    """Undo the marks of tokenised WikiText (`<unk>`, ` @-@ `), which no model met in its own training text."""
    return re.sub(r" ?<unk>", "", re.sub(r" @([-,.])@ ", r"\1", text))


def _reported(texts: Iterator[str], data: Data) -> Iterator[str]:
    yield from texts
    data.report()


def _check_name(name: str) -> None:
    """Raise `ValueError` where a text was given in the place of a name."""
    if not name.strip() or "\n" in name or len(name) > LONGEST_NAME:
        shown = name if len(name) < 40 else f"{name[:40]}..."
        raise ValueError(f"{shown!r} is no name of a file or dataset; give a text in a list: [text].")


def _file_rows(path: Path) -> Iterator[dict]:
    if path.suffix not in FILE_LOADERS:
        raise ValueError(f"{path} must end in one of {', '.join(FILE_LOADERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    if path.suffix != ".parquet":
        _check_encoding(path)
    return _read_rows(path)


def _check_encoding(path: Path) -> None:
    """Raise `ValueError` where a file begins in UTF-16 or UTF-32, which may pass for UTF-8 or fail unclearly."""
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in beginning:
        raise ValueError(
            f"{path} is not UTF-8: it begins with the mark of UTF-16, or has null bytes. Save it as UTF-8."
        )


def _read_rows(path: Path) -> Iterator[dict]:
    from datasets import load_dataset

    # It takes names for patterns, and `data[1].jsonl` is how browsers name a second download.
    literal = glob.escape(str(path.absolute()))
    loader = FILE_LOADERS[path.suffix]
    # Editors may begin a file with a mark of its encoding, which is no part of the text. JSON is read without it.
    options = {"encoding": "utf-8-sig"} if loader == "text" else {}
    try:
        yield from load_dataset(loader, data_files=literal, split="train", streaming=True, **options)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8: it holds the byte {byte:#04x} where none can be. Save it as UTF-8."
        ) from error
    # Whatever Arrow makes of malformed files says at which row, but not of which file.
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _shuffled(rows: Any, seed: int | None) -> Any:
    from datasets import Dataset

    if seed is None:
        return rows
    # A stream shuffles within a buffer, a dataset on disk as a whole.
    return rows.shuffle(seed=seed) if isinstance(rows, Dataset) else rows.shuffle(seed=seed, buffer_size=1000)


def _builtin_rows() -> Iterator[dict]:
    from pydoc_data.topics import topics

    return ({"text": topics[name]} for name in sorted(topics))
