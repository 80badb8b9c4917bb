"""States of long stages on disk: written whole, and taken up only by the run that they belong to."""

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

# A state: tensors and JSON values.
State = tuple[dict[str, torch.Tensor], dict[str, Any]]

# Writing takes no larger share of the time than one in so many.
SHARE = 10


class HasFingerprint(Protocol):
    """Tokens that a fingerprint tells from others."""

    @property
    def fingerprint(self) -> str: ...


class Resume:
    """The states of all stages of a run, one file per stage in one folder, from which the same run resumes.

    Args:
        folder (`Path`, *optional*): where; without one nothing is kept, and nothing found.
        identity (`dict`): what the states belong to, as JSON values.
        seconds (`float`, defaults to 0): a stage writes its state at most so often.

    Raises:
        OSError: where the folder is a file, or nothing can be written there.
    """

    def __init__(self, folder: Path | None = None, identity: dict[str, Any] | None = None, seconds: float = 0.0):
        if folder is not None:
            # Whatever is wrong with the folder shows before anything is measured.
            check_output_file(folder / "state")
        self._folder = folder
        self._identity = identity or {}
        self._seconds = seconds

    def stage(self, name: str, calibration: HasFingerprint | None = None, own: bool = False, **inputs) -> Stage:
        """Return the state of one stage.

        Args:
            name (`str`): of its file.
            calibration (`Calibration`, *optional*): the tokens that it runs.
            own (`bool`, defaults to `False`): with several processes each has a state of its own; otherwise all have
                the same, which the main one writes and reads.
            inputs: what else the state depends on, as JSON values.
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
        """Return a folder for what a stage keeps beside its state, or `None` where nothing is kept.

        Args:
            name, calibration, inputs: as for `stage`.

        Raises:
            ValueError: where there is one that belongs to another run, naming the first difference.
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
        """Return what `take` makes of the tensors and numbers of the state, or `None` where there is none.

        Raises:
            ValueError: where it belongs to another run, naming the first difference, or is damaged.
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
                f"{self._path} belongs to another run: {difference}. Name another folder, or delete it to start "
                f"afresh."
            )
        try:
            return take(tensors, numbers)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise self._not_a_state(error) from error

    def save(self, state: Callable[[], State]) -> None:
        """Write a state beside its file and rename it."""
        if self._path is None or not (self._own or ranks.is_main()):
            return
        start = time.monotonic()
        tensors, numbers = state()
        save_tensors_atomically(self._path, tensors, {**numbers, "identity": self._identity})
        self._written = time.monotonic()
        self._pause = max(self._seconds, SHARE * (self._written - start) if self._seconds else 0.0)

    def save_now_and_then(self, state: Callable[[], State]) -> None:
        """Write a state unless that was done a short while ago."""
        if time.monotonic() - self._written >= self._pause:
            self.save(state)

    def _read(self, path: Path) -> bytes:
        def read() -> bytes:
            return path.read_bytes() or b"\0" if path.exists() else b""

        return read() if self._own else ranks.bytes_from_main(read() if ranks.is_main() else b"")

    def _not_a_state(self, error: Exception) -> ValueError:
        return ValueError(f"{self._path} is no state of a run: {type(error).__name__}: {error}.")


def _parsed(content: bytes) -> State:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load(content), json.loads(header["__metadata__"][METADATA_KEY])


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a fingerprint of named tensors: of their names, dtypes, shapes and bytes, which are the same on every
    device and under every version of torch."""
    # A few gigabytes a second, where hashes made for secrets read a tenth of that.
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
