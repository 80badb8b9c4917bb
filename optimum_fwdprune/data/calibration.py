"""Calibration tokens with their padding, and which of them count in a loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ..runs import ranks
from .messages import refusing_all
from .tokens import check_table, present_tokens


class Windows(NamedTuple):
    """Windows as the inputs of a model.

    Args:
        input_ids (`Tensor[windows, tokens]`, int64): the tokens.
        attention_mask (`Tensor[windows, tokens]`, *optional*): 0 where a token is padding.
        inputs (`dict[str, Tensor]`): other inputs, such as pixel values.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """Windows of calibration tokens, and the name of their source.

    Args:
        input_ids (`Tensor[n_samples, seq_len]`, int64): the tokens; other integers are converted.
        attention_mask (`Tensor[n_samples, seq_len]`, *optional*): a mask that is 0 where a token is padding; any dtype
            is converted to int64.
        source (`str`): name of their source, for the record.
        inputs (`tuple[Mapping[str, Tensor], ...]`, *optional*): other inputs of a multimodal model for every window,
            such as the pixel values of its images. A batch joins them along their first axis.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    source: str = "tokens"
    inputs: tuple[Mapping[str, torch.Tensor], ...] = ()

    def __post_init__(self):
        for name in ("input_ids", "attention_mask"):
            values = getattr(self, name)
            if not isinstance(values, torch.Tensor) and (values is not None or name == "input_ids"):
                raise ValueError(
                    f"{name} of a Calibration must be a tensor [n_samples, seq_len]; got a {type(values).__name__}. "
                    f"Pass torch.tensor(...), or pass lists and arrays as dataset."
                )
            with refusing_all():
                check_table(values, name)
        if self.input_ids.dim() != 2 or self.input_ids.numel() == 0:
            raise ValueError(
                f"Calibration tokens must be [n_samples, seq_len] and not empty; got {tuple(self.input_ids.shape)}."
            )
        dtype = self.input_ids.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise ValueError(f"Calibration tokens must be int64 token ids; got {dtype}. Pass a tokenizer's input_ids.")
        # Embeddings and losses support few integer dtypes other than int64.
        object.__setattr__(self, "input_ids", self.input_ids.long())
        if self.attention_mask is None:
            return
        if self.attention_mask.shape != self.input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {list(self.input_ids.shape)}; it has "
                f"{list(self.attention_mask.shape)}."
            )
        with refusing_all():
            present_tokens(self.attention_mask)
        object.__setattr__(self, "attention_mask", self.attention_mask.long())

    def batches(self, batch_size: int) -> Iterator[Windows]:
        """Yield the windows, at most `batch_size` at a time."""
        return (self.windows(places) for places in torch.arange(len(self)).split(batch_size))

    def windows(self, which: torch.Tensor | slice) -> Windows:
        """Return some windows as the inputs of a model."""
        inputs = self._inputs_of(which)
        names = dict.fromkeys(name for of_window in inputs for name in of_window)
        joined = {name: torch.cat([of_window[name] for of_window in inputs if name in of_window]) for name in names}
        mask = None if self.attention_mask is None else self.attention_mask[which]
        return Windows(self.input_ids[which], mask, joined)

    def part(self, which: torch.Tensor | slice) -> Calibration:
        """Return some of the windows."""
        mask = None if self.attention_mask is None else self.attention_mask[which]
        return Calibration(self.input_ids[which], mask, self.source, self._inputs_of(which))

    def _inputs_of(self, which: torch.Tensor | slice) -> tuple[Mapping[str, torch.Tensor], ...]:
        places = torch.arange(len(self))[which].tolist() if self.inputs else ()
        return tuple(self.inputs[place] for place in places)

    def split(self, every: int) -> tuple[Calibration, Calibration | None]:
        """Return the windows without every `every`-th one, and these; `None` instead of these if there is only one."""
        # Windows that hold nothing but padding do not count.
        mask = self.attention_mask
        present = torch.arange(len(self.input_ids)) if mask is None else mask.any(1).nonzero().flatten()
        which = present[every - 1 :: every] if len(present) >= every else present[-1:]
        if len(present) < 2:
            return self, None
        held_out = torch.zeros(len(self.input_ids), dtype=torch.bool)
        held_out[which.to(held_out.device)] = True
        most, others = (self.part(which) for which in (~held_out, held_out))
        return most, others

    def own_share(self) -> Calibration | None:
        """Return the windows that this process measures; `None` where there are too few for all processes."""
        which = slice(ranks.rank(), None, ranks.world_size())
        return self.part(which) if which.start < len(self.input_ids) else None

    def __len__(self) -> int:
        return len(self.input_ids)

    def after(self, count: int) -> Calibration:
        """Return the windows after the first `count`."""
        return self.part(slice(count, None))

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.bool().sum())

    @property
    def fingerprint(self) -> str:
        """The first digits of a SHA-256 of the tokens and, if there is a mask, of their padding."""
        digest = hashlib.sha256(self.input_ids.to(torch.int64).cpu().numpy().tobytes())
        if self.attention_mask is not None:
            digest.update(self.attention_mask.bool().cpu().numpy().tobytes())
        for of_window in self.inputs:
            for name, values in of_window.items():
                digest.update(name.encode() + values.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def counted_targets(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which predicted tokens count, bool `[batch_size, seq_len - 1]`: not padding, nor after padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    mask = attention_mask.bool()
    return mask[:, 1:] & mask[:, :-1]


def joined(parts: Sequence[Calibration], source: str, seed: int) -> Calibration:
    """Return the windows of several calibrations, shuffled by a seed; shorter windows are padded at their end.

    Args:
        parts (sequence of [`Calibration`]): the windows, which are those of text or tokens.
        source (`str`): name of their source.
        seed (`int`): the seed.
    """
    tokens = [window for part in parts for window in part.input_ids]
    present = [
        window
        for part in parts
        for window in (torch.ones_like(part.input_ids) if part.attention_mask is None else part.attention_mask)
    ]
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    mask = pad_sequence(present, batch_first=True)[order]
    return Calibration(pad_sequence(tokens, batch_first=True)[order], None if mask.all() else mask, source)
