"""States of long stages on disk, from which only the run that they belong to resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load

from ..files import METADATA_KEY, check_output_file, save_tensors_atomically
from ..words import first_difference
from . import ranks


T = TypeVar("T")

# A state consists of tensors and JSON values.
State = tuple[dict[str, torch.Tensor], dict[str, Any]]

# Writing takes at most one part in this many of the time.
SHARE = 10


class HasFingerprint(Protocol):
    """Tokens with a fingerprint."""

    @property
    def fingerprint(self) -> str: ...


class Resume:
    """The states of all stages of a run, from which the same run resumes: a folder with a file per stage.

    Args:
        folder (`Path`, *optional*): the folder; by default no state is stored.
        identity (`dict`): the identity of the run, as JSON values; only a run with an equal one resumes.
        seconds (`float`, defaults to 0): smallest number of seconds between two writes of a stage's state.

    Raises:
        OSError: where the folder is a file, or nothing can be written to it.
    """

    def __init__(self, folder: Path | None = None, identity: dict[str, Any] | None = None, seconds: float = 0.0):
        if folder is not None:
            # The folder is checked before anything is measured.
            check_output_file(folder / "state")
        self._folder = folder
        self._identity = identity or {}
        self._seconds = seconds

    def stage(self, name: str, calibration: HasFingerprint | None = None, own: bool = False, **inputs) -> Stage:
        """Return the state of one stage.

        Args:
            name (`str`): name of its file.
            calibration (`Calibration`, *optional*): the tokens that the stage uses.
            own (`bool`, defaults to `False`): whether every process has its own state. By default all processes have
                the same state, which the main one writes and reads.
            inputs: other inputs that the state depends on, as JSON values.
        """
        if self._folder is None:
            return Stage(None, {}, 0.0, own)
        if own and ranks.world_size() > 1:
            name = f"{name}.{ranks.rank()}-of-{ranks.world_size()}"
        identity = {**self._identity, **inputs}
        if calibration is not None:
            identity["tokens"] = calibration.fingerprint
        return Stage(self._folder / f"{name}.safetensors", json.loads(json.dumps(identity)), self._seconds, own)

    def folder(self, name: str, calibration: HasFingerprint | None = None, **inputs) -> Path | None:
        """Return a folder for further files of a stage; `None` where no state is stored.

        Args:
            name, calibration, inputs: as for `stage`.

        Raises:
            ValueError: where the folder belongs to another run; the message names the first difference.
        """
        if self._folder is None:
            return None
        stage = self.stage(name, calibration, **inputs)
        if stage.load(lambda _tensors, _numbers: True) is None:
            stage.save(lambda: ({}, {}))
        return self._folder / name


class Stage:
    """The state of one stage of a run; see [`Resume.stage`]."""

    def __init__(self, path: Path | None, identity: dict[str, Any], seconds: float, own: bool):
        self._path = path
        self._identity = identity
        self._own = own
        self._pause = self._seconds = seconds
        self._written = time.monotonic()

    def load(self, take: Callable[[dict[str, torch.Tensor], dict[str, Any]], T]) -> T | None:
        """Return the result of `take` for the tensors and numbers of the state; `None` where there is no state.

        Raises:
            ValueError: where the state belongs to another run (the message names the first difference), or is damaged.
        """
        content = b"" if self._path is None else self._read(self._path)
        if not content:
            return None
        try:
            tensors, numbers = _parsed(content)
            identity = numbers.pop("identity")
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise self._not_a_state(error) from error
        if difference := first_difference(identity, self._identity):
            raise ValueError(
                f"{self._path} belongs to another run: {difference}. Name another folder, or delete it to start again."
            )
        try:
            return take(tensors, numbers)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise self._not_a_state(error) from error

    def save(self, state: Callable[[], State]) -> None:
        """Write a state, which replaces the former one as a whole."""
        if self._path is None or not (self._own or ranks.is_main()):
            return
        start = time.monotonic()
        tensors, numbers = state()
        save_tensors_atomically(self._path, tensors, {**numbers, "identity": self._identity})
        self._written = time.monotonic()
        self._pause = max(self._seconds, SHARE * (self._written - start) if self._seconds else 0.0)

    def save_now_and_then(self, state: Callable[[], State]) -> None:
        """Write a state unless the last one was written a short time ago."""
        if time.monotonic() - self._written >= self._pause:
            self.save(state)

    def _read(self, path: Path) -> bytes:
        def read() -> bytes:
            return path.read_bytes() or b"\0" if path.exists() else b""

        return read() if self._own else ranks.bytes_from_main(read() if ranks.is_main() else b"")

    def _not_a_state(self, error: Exception) -> ValueError:
        return ValueError(f"{self._path} is not the state of a run: {type(error).__name__}: {error}.")


def _parsed(content: bytes) -> State:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load(content), json.loads(header["__metadata__"][METADATA_KEY])


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a fingerprint of named tensors: of their names, dtypes, shapes and bytes. It is the same on every device
    and with every version of torch."""
    # It hashes a few gigabytes per second, about ten times as many as cryptographic hashes.
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
