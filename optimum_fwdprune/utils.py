"""Files that are whole or absent, tables, models in eval mode, fair timing."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ranks
from .module_state import check_not_consumed, forward_state_kept
from .progress import announce as announce
from .progress import one_step as one_step
from .progress import progress as progress


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


# The one metadata entry of our safetensors files.
METADATA_KEY = "fwdprune"

# The least likeness of two names of which one is taken for a misspelling of the other.
NEAR = 0.75

# How models are run for hidden states or logits, whatever else their configs ask for: states and attentions of every
# layer would be held for nothing, and layers that stand in for others return none.
PLAIN_OUTPUTS = {"use_cache": False, "output_attentions": False, "output_hidden_states": False, "return_dict": True}


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary sibling, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_what_is_full(path):
        temporary = _hidden_sibling(path, "partial")
        try:
            # Made anew, with the mode that any new file has.
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def save_tensors_atomically(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write tensors and JSON values to a safetensors file through a temporary sibling."""
    _save_atomically(path, tensors, {METADATA_KEY: json.dumps(metadata)})


def save_weights_atomically(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of weights, as transformers does, through a temporary sibling."""
    _save_atomically(path, tensors, {"format": "pt"})


def _save_atomically(path: Path, tensors: dict[str, torch.Tensor], entry: dict[str, str]) -> None:
    # One entry: safetensors writes several in random order, and equal contents should be equal files.
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    # The same name every time, so that what a killed process left behind is replaced; but not that of another process.
    partial = path.with_name(f".{path.name}.{ranks.launched_as()}.partial")
    with naming_what_is_full(path):
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, entry)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors_atomically` wrote; a damaged file raises one of `KeyError`, `ValueError`,
    `SafetensorError`."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {})[METADATA_KEY])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  safe_open is no dict


def seeded_generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that the numbers alone determine; equal numbers give equal streams, others unrelated ones."""
    import numpy as np
    import torch

    words = np.random.SeedSequence(numbers).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 ^ int(words[1]))


def as_path(value: Any, name: str) -> Path:
    """Return the path that `value`, passed as the argument `name`, stands for.

    Raises:
        TypeError: where it is neither text nor a path.
    """
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a str or a Path; got {value!r:.80} ({type(value).__name__}).")
    return Path(value)


def check_output_file(file: str | Path, overwrite: bool = True) -> Path:
    """Return `file` as a path that can be written, and read where it exists.

    Raises:
        FileExistsError: where it exists and `overwrite` is not set.
        OSError: where it is a folder, or nothing can be written beside it.
    """
    file = as_path(file, "file").expanduser().absolute()
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a file.")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file} exists. Name another file, or pass overwrite to replace it.")
    _check_writable(file.parent, file)
    return file


def check_output_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """Return `folder` as a path that a checkpoint can be moved to.

    Raises:
        FileExistsError: where it is a file, or holds files and `overwrite` is not set.
        OSError: where nothing can be written beside it.
    """
    folder = as_path(folder, "folder").expanduser().absolute()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; name a folder to write the checkpoint to.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty. Name another folder, or pass overwrite to replace it.")
    _check_writable(folder.parent, folder)
    return folder


def _check_writable(parent: Path, wanted: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise type(error)(f"Cannot write beside {wanted}: {error.strerror or error}.") from error


class DiskFullError(OSError):
    """There is no more room for a file."""


# No space, over quota, larger than a file may be: `OSError` has them as numbers, safetensors in its message.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming_what_is_full(wanted: Path) -> Iterator[None]:
    """Say in errors of a disk that is full what could not be written.

    Raises:
        DiskFullError: in their place.
    """
    try:
        yield
    except Exception as error:
        numbers = {error.errno} if isinstance(error, OSError) else set()
        full = isinstance(error, DiskFullError) or numbers & {*_FULL}
        if not full and not any(f"os error {number})" in str(error) for number in _FULL):
            raise
        free = shutil.disk_usage(wanted.parent).free
        raise DiskFullError(
            f"There is no room for {wanted}: {free / 1e9:.2f} GB are free on that disk, or its quota or largest file "
            f"size is reached. Nothing of it was left behind and nothing else was touched; make room or name another "
            f"place."
        ) from error


@contextmanager
def folder_moved_into_place(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `folder` that becomes it when the block succeeds and vanishes when it does not."""
    folder = check_output_folder(folder, overwrite)
    temporary = _hidden_sibling(folder, "partial")
    temporary.mkdir()
    # What a new folder may be used for by whom: reading the umask would change it for a moment, for all threads.
    mode = temporary.stat().st_mode & 0o777
    try:
        with naming_what_is_full(folder):
            yield temporary
        for file in temporary.rglob("*"):
            # Some writers make files that nobody else may read.
            file.chmod(mode if file.is_dir() else mode & 0o666)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            os.replace(folder, old / folder.name)
            try:
                os.replace(temporary, folder)
            except BaseException:
                os.replace(old / folder.name, folder)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def public_name(name_or_path: str) -> str:
    """Return a Hub repository as it is, a file or folder by its last part, also where it is gone: checkpoints get
    shared, home directories do not."""
    path = Path(name_or_path)
    return path.name if is_no_repository(name_or_path) or path.exists() else name_or_path


def is_no_repository(name_or_path: str) -> bool:
    """Whether a name can only be that of a file or folder; a repository of the Hub is `name` or `owner/name`."""
    path = Path(name_or_path)
    return path.is_absolute() or name_or_path.startswith((".", "~")) or "\\" in name_or_path or len(path.parts) > 2


def first_difference(found: Any, expected: Any, name: str = "content") -> str | None:
    """Say where two JSON values differ first, or return `None` where they are equal."""
    if isinstance(found, dict) and isinstance(expected, dict):
        differences = (first_difference(found.get(key), expected.get(key), key) for key in {**expected, **found})
        return next((difference for difference in differences if difference), None)
    return None if found == expected else f"its {name} is {found!r}, this one's is {expected!r}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a sentence, with a space before it, that names the nearest of `words`, or nothing where none is near.

    Near are words of nearly the same letters, and those that the word is a part of, as `speedup` is of
    `target_speedup`.
    """
    import difflib

    def plain(name: str) -> str:
        # Underscores and dashes, and either case, mean the same to whoever types them.
        return name.lower().replace("-", "_").strip("_")

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, plain(word), plain(name)).ratio()

    near = [
        name
        for name in words
        if likeness(name) >= NEAR
        or sorted(plain(name)) == sorted(plain(word))
        or (len(plain(word)) > 3 and plain(word) in plain(name).split("_"))
    ]
    return f" Did you mean {max(near, key=likeness)}?" if near else ""


def median_seconds(runs: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Return the median seconds of each run after one to warm up.

    They take turns, so that whatever else the machine does slows them all: compare the results of one call.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    turns = [turn for _ in range(repeats + 1) for turn in zip(runs, seconds)]
    for run, taken in progress(turns, "Timing", unit="run"):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    # The first run pays for kernels and caches.
    return [statistics.median(taken[1:]) for taken in seconds]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as a table of plain text: the same on a terminal, in a file, in a notebook and in a test."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        # What does not fit is broken and not cut: the ends of names are what tells them apart.
        table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    output = io.StringIO()
    # In a notebook rich writes to the notebook, and where FORCE_COLOR is set it writes escape codes.
    plain: dict[str, Any] = {"force_jupyter": False, "force_terminal": False, "color_system": None}
    Console(file=output, width=110, legacy_windows=False, **plain).print(table)
    return output.getvalue().rstrip("\n")


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as an HTML table, which notebooks show."""
    from html import escape

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random number generators of Python, numpy and torch as they were before the block."""
    import random

    import numpy as np
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put `model` into eval mode while the context is open, and leave modes, buffers and what forward passes change in
    its modules as they were.

    Raises:
        ValueError: where `model` was consumed by pruning.
    """
    check_not_consumed(model)
    modes = [(module, module.training) for module in model.modules()]
    with forward_state_kept(model):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _hidden_sibling(path: Path, purpose: str) -> Path:
    """Return a path beside `path` that nothing has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{purpose}")
