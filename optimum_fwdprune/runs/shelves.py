"""Tensors that are stored for later: in memory, or in files, from which an interrupted run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..files import write_text_atomically
from . import ranks
from .devices import on_host


class Shelf:
    """Tensors by name, in host memory, or in the files of a folder.

    A tensor that is removed stays in the folder until the shelf is settled, so that a run that is killed in between
    resumes from the tensors at the last settling. If there are several processes, each has its own folder for its
    share of the tokens, and all are settled at the same layer.

    Args:
        folder (`Path`, *optional*): the folder, which must be the same for all processes; by default host memory is
            used.

    Attributes:
        settled (`int`): number of the layer whose inputs the tensors are; 0 at the start.
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
            # In a run that was killed, only some of the processes may have settled the last layer.
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
        """Return a tensor and remove it; its file is removed when the shelf is settled."""
        tensor = self[name]
        self.forget(name)
        return tensor

    def forget(self, name: str) -> None:
        """Remove a tensor; its file is removed when the shelf is settled."""
        if self._folder is None:
            del self._tensors[name]
        else:
            self._taken.append(name)

    def settle(self, layer: int) -> None:
        """Make the current tensors those that a restarted run resumes from, as the inputs of `layer`."""
        self.settled = layer
        if self._folder is not None:
            write_text_atomically(self._marker, json.dumps(layer))
            # Files of the layer before are kept until all processes have settled this layer.
            ranks.gathered(torch.tensor(layer))
            for name in self._taken:
                self._file(name).unlink(missing_ok=True)
            self._taken = []

    def clear(self) -> None:
        """Remove all tensors; the number of the settled layer is kept."""
        self._tensors, self._taken = {}, []
        if self._folder is not None:
            for file in self._folder.glob("*.safetensors"):
                file.unlink()

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"


def own_folder(folder: Path) -> Path:
    """Return the folder of this process inside `folder`; in a single process it is `folder` itself."""
    return folder if ranks.world_size() == 1 else folder / f"{ranks.rank()}-of-{ranks.world_size()}"
