"""Hidden states of all training sequences, in the memory of the host or in a file that is mapped into memory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch


GIBIBYTE = 2**30


class HiddenStates:
    """The hidden states of sequences of any lengths, one vector per token.

    Args:
        lengths (sequence of `int`): the tokens of every sequence.
        hidden_size (`int`): features of a hidden state.
        dtype (`torch.dtype`): the dtype that they are stored in.
        file (`Path`, *optional*): a new file to store them in; by default the memory of the host.
    """

    def __init__(self, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype, file: Path | None = None):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self._places = [slice(end - length, end) for end, length in zip(ends, lengths)]
        self._hidden_size = hidden_size
        if file is None:
            self._values = torch.empty(ends[-1], hidden_size, dtype=dtype)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            mapped = torch.from_file(str(file), shared=True, size=ends[-1] * hidden_size, dtype=dtype)
            self._values = mapped.view(ends[-1], hidden_size)

    def read(self, rows: Sequence[int], length: int) -> torch.Tensor:
        """Return the hidden states of some sequences, `[rows, length, hidden_size]`, with zeros after their end."""
        padded = self._values.new_zeros(len(rows), length, self._hidden_size)
        for place, row in enumerate(rows):
            states = self._values[self._places[row]]
            padded[place, : len(states)] = states
        return padded

    def write(self, rows: Sequence[int], states: torch.Tensor) -> None:
        """Store the hidden states of some sequences, `[rows, length, hidden_size]`, without those after their end."""
        states = states.to("cpu", self._values.dtype)
        for place, row in enumerate(rows):
            where = self._places[row]
            self._values[where] = states[place, : where.stop - where.start]


def goes_to_files(num_bytes: int, limit: float | None, folder: Path) -> bool:
    """Return whether hidden states are stored in files, since they take more memory than they may.

    Args:
        num_bytes (`int`): size of all hidden states.
        limit (`float`, *optional*): the memory that they may take, in GiB; by default half of what is available.
        folder (`Path`): the folder of the files, which need not exist yet.

    Raises:
        OSError: where the files would not fit on the disk of the folder.
    """
    allowed = psutil.virtual_memory().available / 2 if limit is None else limit * GIBIBYTE
    if num_bytes <= allowed:
        return False
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise OSError(
            f"The hidden states of the training data take {num_bytes / GIBIBYTE:.1f} GiB, more than the "
            f"{allowed / GIBIBYTE:.1f} GiB of memory that they may take and the {free / GIBIBYTE:.1f} GiB that are "
            f"free in {folder}. Train on fewer tokens, raise hidden_states_gb, or name another output_dir."
        )
    return True
