"""Tensors put aside: in memory, or in files of a folder, from where an interrupted run takes them up again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..files import write_text_atomically
from . import ranks
from .devices import on_host


class Shelf:
    """Tensors by name. Without a folder they wait in the memory of the host; with one they lie in files while nobody
    looks at them.

    What is taken from a folder stays there until the shelf is settled: a run that is killed in between finds all that
    there was when it settled last. Of several processes each has a folder of its own, since each has its own share of
    the tokens, and all are settled at the same layer.

    Args:
        folder (`Path`, *optional*): where to; all processes name the same one.

    Attributes:
        settled (`int`): number of the layer that the tensors are in front of; 0 at the start.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder = own_folder(folder) if folder is not None else None
        self._tensors: dict[str, torch.Tensor] = {}
        self._taken: list[str] = []
        self.settled = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if self._marker.exists():
                self.settled = json.loads(self._marker.read_text())
            # A run that was killed may have settled a layer in some of its processes only.
            self.settled = int(ranks.gathered(torch.tensor(self.settled)).min())

    @property
    def _marker(self) -> Path:
        assert self._folder is not None
        return self._folder / "settled.json"

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        if self._folder is None:
            self._tensors[name] = on_host(tensor)
        else:
            save_file({"tensor": tensor.contiguous()}, self._file(name))

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._folder is None:
            return self._tensors[name]
        return load_file(self._file(name))["tensor"]

    def pop(self, name: str) -> torch.Tensor:
        """Return a tensor and forget it, in a folder as soon as the shelf is settled."""
        tensor = self[name]
        self.forget(name)
        return tensor

    def forget(self, name: str) -> None:
        """Forget a tensor, in a folder as soon as the shelf is settled."""
        if self._folder is None:
            del self._tensors[name]
        else:
            self._taken.append(name)

    def settle(self, layer: int) -> None:
        """Let what is there now be what a run that starts again goes on from."""
        self.settled = layer
        if self._folder is not None:
            write_text_atomically(self._marker, json.dumps(layer))
            # Until all have written theirs, each can go back to the layer before.
            ranks.gathered(torch.tensor(layer))
            for name in self._taken:
                self._file(name).unlink(missing_ok=True)
            self._taken = []

    def clear(self) -> None:
        """Forget every tensor; what was settled stays known."""
        self._tensors, self._taken = {}, []
        if self._folder is not None:
            for file in self._folder.glob("*.safetensors"):
                file.unlink()

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"


def own_folder(folder: Path) -> Path:
    """Return the folder of this process inside `folder`: that itself where there is one process."""
    return folder if ranks.world_size() == 1 else folder / f"{ranks.rank()}-of-{ranks.world_size()}"
