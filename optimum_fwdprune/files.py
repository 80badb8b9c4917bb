"""Writing files and folders atomically, and checks that they can be written."""

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
    """Write `text` to `path` through a temporary file beside it, so that `path` is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_what_is_full(path):
        temporary = _hidden_sibling(path, "partial")
        try:
            # A new file has the default permissions; one of `tempfile` would not.
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def save_tensors_atomically(path: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write tensors and JSON values to a safetensors file through a temporary file beside it."""
    _save_atomically(path, tensors, {METADATA_KEY: json.dumps(metadata)})


def save_weights_atomically(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of weights, as transformers does, through a temporary file beside it."""
    _save_atomically(path, tensors, {"format": "pt"})


def _save_atomically(path: Path, tensors: dict[str, torch.Tensor], entry: dict[str, str]) -> None:
    # There is one metadata entry, since safetensors writes several in random order, so that files would differ.
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary name is always the same, so that a file of a killed process is replaced, but it differs between
    # processes of one launcher.
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
    """Return `value`, which was passed as the argument `name`, as a path.

    Raises:
        TypeError: where it is neither a `str` nor a `Path`.
    """
    if not isinstance(value, (str, Path)):
        raise TypeError(f"{name} must be a str or a Path; got {value!r:.80} ({type(value).__name__}).")
    return Path(value)


def check_output_file(file: str | Path, overwrite: bool = True) -> Path:
    """Return `file` as an absolute path, after checking that it can be written.

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
    """Return `folder` as an absolute path, after checking that a checkpoint can be moved to it.

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
    """The disk is full, or a quota or the largest file size is reached."""


# Numbers of these errors, which `OSError` has as an attribute, and safetensors in its message.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def naming_what_is_full(wanted: Path) -> Iterator[None]:
    """Turn errors of a full disk into `DiskFullError`, whose message names the file that could not be written."""
    try:
        yield
    except Exception as error:
        numbers = {error.errno} if isinstance(error, OSError) else set()
        full = isinstance(error, DiskFullError) or numbers & {*_FULL}
        if not full and not any(f"os error {number})" in str(error) for number in _FULL):
            raise
        free = shutil.disk_usage(wanted.parent).free
        raise DiskFullError(
            f"There is no room for {wanted}: the disk has {free / 1e9:.2f} GB free, or its quota or largest file size "
            f"is reached. No incomplete file was left, and no other file was changed; free some space, or name "
            f"another place."
        ) from error


@contextmanager
def folder_moved_into_place(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` if the block succeeds, and removed if it fails."""
    folder = check_output_folder(folder, overwrite)
    temporary = _hidden_sibling(folder, "partial")
    temporary.mkdir()
    # The permissions of a new folder. Reading the umask instead would change it for a moment, for all threads.
    mode = temporary.stat().st_mode & 0o777
    try:
        with naming_what_is_full(folder):
            yield temporary
        for file in temporary.rglob("*"):
            # Some libraries write files that only their owner may read.
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
    """Return a path beside `path` that does not exist."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{purpose}")
