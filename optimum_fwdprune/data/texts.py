"""Opening sources of texts and rows: files, datasets of the Hub or in memory, and strings."""

from __future__ import annotations

import codecs
import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..loading.offline import naming_offline
from .in_memory import row_of, rows_of_columns, rows_of_pandas, with_mappings
from .messages import is_message, refusing_all
from .mixing import Mixing
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
# The name of calibration text that the model generates itself.
SELF = "self"
KINDS = {CHAT: "chats", TOKENS: "tokens"}
# A string longer than this cannot be the name of a file or a dataset.
LONGEST_NAME = 4096
FILE_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_data(
    source: Any,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> Data:
    """Open a source of data as rows of text, chats or tokens; rows that cannot be used are left out and counted.

    Args:
        source, config, split: see [`open_rows`].
        column (`str`, *optional*): column of the text, the messages or the tokens; by default see `Data`.

    Raises:
        ValueError, FileNotFoundError: see [`open_rows`] and `Data`.
    """
    return Data(*open_rows(source, config, split), column)


def open_rows(
    source: Any, config: str | None = None, split: str = "train", mixing: Mixing | None = None
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
        mixing (`Mixing`, *optional*): how a dataset of the Hub is shuffled, by default not at all; files and data in
            memory are not shuffled.

    Raises:
        ValueError: where the source is of an unknown kind, or has no such split; and during reading, where a file's
            content does not have the format of its name.
        OSError: where there is no such file or dataset, or the Hub cannot be reached.
    """
    if isinstance(source, (str, Path)):
        if source == BUILTIN:
            return BUILTIN, _builtin_rows()
        if is_self(source):
            raise ValueError(
                f"{SELF!r} is text that a model generates itself, for calibration and for training with a teacher; "
                f"name a file (.txt, .json, .jsonl, .parquet), {BUILTIN!r} or a dataset of the Hub."
            )
        if source in PRESETS:
            return str(source), _shuffled(load_rows(**PRESETS[str(source)], split=split), mixing)
        _check_name(str(source))
        path = Path(source)
        if path.suffix in FILE_LOADERS or path.exists():
            return path.name, _file_rows(path)
        return str(source), _shuffled(load_rows(str(source), config, split), mixing)
    if holds_splits(source):
        if split not in source:
            raise ValueError(
                f"The dataset has no split {split!r}; it has {', '.join(map(str, source))}. Name one as dataset_split."
            )
        source = source[split]
    source = with_mappings(source)
    if hasattr(source, "iterrows") or hasattr(source, "to_frame"):
        source = rows_of_pandas(source)
    elif hasattr(source, "tolist"):
        with refusing_all():
            check_table(source, "the data")
        source = source.tolist()
    elif isinstance(source, Mapping):
        source = rows_of_columns(source)
    if hasattr(source, "column_names") or hasattr(source, "features"):
        # A column of a dataset has these attributes too; its items are values, which `row_of` turns into rows.
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
        # Datasets of PyTorch have these methods.
        return "rows", (row_of(source[number]) for number in range(len(source)))
    raise ValueError(
        f"Cannot read a {type(source).__name__}. Pass a name, a file, texts, chats or token ids in a list, or a "
        f"datasets.Dataset."
    )


def holds_splits(source: Any) -> bool:
    """Return whether a source is a mapping of splits to datasets."""
    return (
        isinstance(source, Mapping) and bool(source) and all(hasattr(part, "column_names") for part in source.values())
    )


def open_texts(
    source: Any,
    config: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> tuple[str, Iterator[str]]:
    """Return a name for a source and its texts, which end with a separator, so that they can be joined.

    The arguments are those of [`open_data`].
    """
    data = open_data(source, config, split, column)
    return data.name, texts_in(data, source)


def texts_in(data: Data, source: Any) -> Iterator[str]:
    """Return the texts of data, as [`open_texts`] does.

    Raises:
        ValueError: where the data holds something else.
    """
    if data.kind != TEXT:
        raise ValueError(
            f"{data.name} holds {KINDS[data.kind]}, but text is needed. Write it to a .txt file, or set "
            f"dataset_column to a column of text."
        )
    return _reported(texts_of(data, source), data)


def texts_of(data: Data, source: Any) -> Iterator[str]:
    """Yield the texts of data, which end with a separator, so that they can be joined."""
    # The lines of a text file belong together; other rows are separate texts.
    separator = "\n" if isinstance(source, (str, Path)) and str(source).endswith(".txt") else "\n\n"
    return (text + separator for text in data)


def is_self(source: Any) -> bool:
    """Return whether a source is text that a model generates itself."""
    return isinstance(source, str) and source == SELF


def always_text(source: Any) -> bool:
    """Return whether a source is known to hold text before it is opened."""
    return isinstance(source, (str, Path)) and (
        source in PRESETS or source == BUILTIN or Path(source).suffix == ".txt"
    )


def load_rows(path: str, name: str | None = None, split: str = "train") -> Any:
    """Open a dataset of the Hub as a stream, without downloading all of it; in offline mode its cached copy."""
    from datasets import load_dataset
    from huggingface_hub import is_offline_mode

    with naming_offline(path, "name a file (.txt, .json, .jsonl, .parquet), 'builtin', or for calibration 'self'"):
        return load_dataset(path, name, split=split, streaming=not is_offline_mode())


def detokenize(text: str) -> str:
    """Remove the marks of tokenized WikiText (`<unk>`, ` @-@ `), which no model has seen in its training text."""
    return re.sub(r" ?<unk>", "", re.sub(r" @([-,.])@ ", r"\1", text))


def _reported(texts: Iterator[str], data: Data) -> Iterator[str]:
    yield from texts
    data.report()


def _check_name(name: str) -> None:
    """Raise `ValueError` where a text was passed instead of a name."""
    if not name.strip() or "\n" in name or len(name) > LONGEST_NAME:
        shown = name if len(name) < 40 else f"{name[:40]}..."
        raise ValueError(f"{shown!r} is not the name of a file or dataset; pass a text in a list: [text].")


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
    """Raise `ValueError` where a file is UTF-16 or UTF-32, which is sometimes decoded as UTF-8 without an error."""
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in beginning:
        raise ValueError(
            f"{path} is not UTF-8: it begins with the byte order mark of UTF-16, or has null bytes. Save it as UTF-8."
        )


def _read_rows(path: Path) -> Iterator[dict]:
    from datasets import load_dataset

    # load_dataset expands patterns, and names such as `data[1].jsonl`, which browsers use, would be read as patterns.
    literal = glob.escape(str(path.absolute()))
    loader = FILE_LOADERS[path.suffix]
    # A byte order mark at the beginning of a text file is skipped. The loader of JSON skips it by itself.
    options = {"encoding": "utf-8-sig"} if loader == "text" else {}
    try:
        yield from load_dataset(loader, data_files=literal, split="train", streaming=True, **options)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8: it has the byte {byte:#04x} at an invalid place. Save it as UTF-8."
        ) from error
    # Arrow's errors of malformed files name the row, but not the file.
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _shuffled(rows: Any, mixing: Mixing | None) -> Any:
    """Return the rows of a dataset of the Hub in random order: one on disk as a whole, a stream within a buffer."""
    from datasets import Dataset

    if mixing is None:
        return rows
    if isinstance(rows, Dataset):
        return rows.shuffle(seed=mixing.seed)
    # With a buffer of one row, this shuffles the files alone. Buffers of the library have no limit of characters.
    return mixing.mixed(rows.shuffle(seed=mixing.seed, buffer_size=1))


def _builtin_rows() -> Iterator[dict]:
    from pydoc_data.topics import topics

    return ({"text": topics[name]} for name in sorted(topics))
