"""Files and folders that are whole or absent, and what is checked before they are written."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


# The one metadata entry of our safetensors files.
METADATA_KEY = "fwdprune"


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
    # The same name every time, so that what a killed process left behind is replaced; but not that of another process
    # of the same launcher.
    partial = path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.partial")
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


def _hidden_sibling(path: Path, purpose: str) -> Path:
    """Return a path beside `path` that nothing has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{purpose}")
