"""The hidden states of the pruned and of the dense model over the training data, after one block after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ...data.calibration import Windows
from ...forward.layerwise import Arguments, Batch, LayerRunner
from ..amounts import held_out_evenly
from .hidden_states import HiddenStates, goes_to_files


# The files of the hidden states of the pruned and of the dense model.
FILES = ("pruned.hidden", "dense.hidden")

# Sequences are padded to a multiple of this length, so that there are few shapes of batches, whose arguments are kept.
PADDED_TO = 64


@dataclass(frozen=True)
class Sequences:
    """The sequences of the training data.

    Args:
        ids (`list[Tensor[tokens]]`, int64): their tokens without padding.
        training (`list[int]`): the indices of those that are trained on.
        held_out (`list[int]`): the indices of those that the result is judged on.
    """

    ids: list[torch.Tensor]
    training: list[int]
    held_out: list[int]

    @classmethod
    def of(cls, data: Dataset, held_out: Dataset | None, share: float | None) -> Sequences:
        """Return the sequences of training data.

        Args:
            data (`Dataset`): sequences with `input_ids`, and `attention_mask` where some are padded.
            held_out (`Dataset`, *optional*): held-out data of the same form; by default a share of the sequences.
            share (`float`, *optional*): this share; required where `held_out` is `None`.

        Raises:
            ValueError: where there are fewer than two sequences.
        """
        ids = _without_padding(data)
        if held_out is not None:
            others = _without_padding(held_out)
            return cls(ids + others, list(range(len(ids))), list(range(len(ids), len(ids) + len(others))))
        return cls(ids, *held_out_evenly(len(ids), share))

    @property
    def lengths(self) -> list[int]:
        """The tokens of every sequence."""
        return [len(row) for row in self.ids]

    def padded_length(self, rows: Sequence[int]) -> int:
        """Return the length that a batch of these sequences is padded to."""
        longest = max(len(self.ids[row]) for row in rows)
        most = max(self.lengths)
        return min(most, -(-longest // PADDED_TO) * PADDED_TO)

    def present(self, rows: Sequence[int]) -> torch.Tensor:
        """Return which places of a batch hold a token: bool `[rows, tokens]`."""
        lengths = torch.tensor([len(self.ids[row]) for row in rows])
        return torch.arange(self.padded_length(rows)) < lengths[:, None]

    def chunks(self, rows: Sequence[int], size: int) -> Iterator[list[int]]:
        """Yield the sequences in batches, with those of similar lengths together."""
        ordered = sorted(rows, key=lambda row: (-len(self.ids[row]), row))
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def _without_padding(data: Dataset) -> list[torch.Tensor]:
    rows = data.with_format("torch")
    masked = "attention_mask" in data.column_names
    return [row["input_ids"][row["attention_mask"].bool()] if masked else row["input_ids"] for row in rows]


class Stream:
    """The hidden states of one model over all sequences, before one of its layers.

    Batches are padded at their end and have no mask: with causal attention, no token depends on those after it.

    Args:
        model (`PreTrainedModel`): the model.
        sequences (`Sequences`): the sequences.
        batch_size (`int`): sequences per forward pass.
        file (`Path`, *optional*): a file for the hidden states; by default they are in the memory of the host.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequences, batch_size: int, file: Path | None = None):
        self._runner = LayerRunner(model)
        self._sequences = sequences
        self._batch_size = batch_size
        self._arguments: Arguments = {}
        size = model.config.get_text_config().hidden_size
        self._states = HiddenStates(sequences.lengths, size, model.dtype, file)

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The decoder layers of the model, first to last."""
        return self._runner.layers

    @torch.no_grad()
    def start(self) -> None:
        """Store the inputs of the first layer."""
        for rows in self._chunks():
            self._states.write(rows, self._runner.embed(self._batch(rows)))

    @torch.no_grad()
    def advance(self, layers: range) -> None:
        """Replace the inputs of consecutive layers by their outputs."""
        if not layers:
            return
        for rows in self._chunks():
            self._states.write(rows, self.run(layers, rows, self.read(rows)))

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Return hidden states of some sequences: `[rows, tokens, hidden_size]`, zero after their end."""
        return self._states.read(rows, self._sequences.padded_length(rows))

    def run(self, layers: range, rows: Sequence[int], hidden: torch.Tensor, in_float32: bool = False) -> torch.Tensor:
        """Return the output of consecutive layers for hidden states of some sequences.

        Args:
            layers (`range`): the layers.
            rows (sequence of `int`): the sequences.
            hidden (`Tensor[rows, tokens, hidden_size]`): the inputs of the first of the layers.
            in_float32 (`bool`, defaults to `False`): whether to convert the other inputs of the layers, such as rotary
                positions, to float32, for layers whose weights were converted.
        """
        batch = self._batch(rows)
        if in_float32:
            hidden = hidden.float()
            known: dict[int, Any] = {}
            arguments = {layer: _in_float32(batch.arguments[layer], known) for layer in layers}
            batch = Batch(batch.input_ids, None, arguments)  # type: ignore[arg-type]
        for layer in layers:
            hidden = self._runner.run(layer, batch, hidden)
        return hidden

    def _chunks(self) -> Iterator[list[int]]:
        return self._sequences.chunks(range(len(self._sequences.ids)), self._batch_size)

    def _batch(self, rows: Sequence[int]) -> Batch:
        ids = torch.zeros(len(rows), self._sequences.padded_length(rows), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(self._sequences.ids[row])] = self._sequences.ids[row]
        return self._runner.batch(Windows(ids, None, {}), self._arguments)


def _in_float32(values: Any, known: dict[int, Any]) -> Any:
    """Return nested values with all floating-point tensors in float32; a tensor is converted once."""
    if isinstance(values, torch.Tensor):
        if not values.is_floating_point():
            return values
        if id(values) not in known:
            known[id(values)] = values.float()
        return known[id(values)]
    if isinstance(values, dict):
        return {name: _in_float32(value, known) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_in_float32(value, known) for value in values)
    return values


def streams_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: Sequences,
    batch_size: int,
    limit: float | None,
    folder: Path,
) -> tuple[Stream, Stream]:
    """Return the streams of the pruned and of the dense model, in memory or in files of a folder.

    Args:
        student, teacher (`PreTrainedModel`): the models.
        sequences (`Sequences`): the sequences.
        batch_size (`int`): sequences per forward pass.
        limit (`float`, *optional*): the memory that hidden states may take, in GiB; see [`goes_to_files`].
        folder (`Path`): the folder of the files.
    """
    per_token = sum(model.config.get_text_config().hidden_size * model.dtype.itemsize for model in (student, teacher))
    in_files = goes_to_files(per_token * sum(sequences.lengths), limit, folder)
    files = [folder / name if in_files else None for name in FILES]
    pruned, dense = (
        Stream(model, sequences, batch_size, file) for model, file in zip((student, teacher), files, strict=True)
    )
    return pruned, dense


def remove_files(folder: Path) -> None:
    """Remove the files of hidden states from a folder, and the folder if it is empty then."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
