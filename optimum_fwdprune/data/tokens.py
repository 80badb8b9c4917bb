"""Sequences of tokens as rows, tensors and arrays hold them: token ids, which of them are padding, and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from .messages import UnusableRow


Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class Tokens:
    """A sequence of tokens as its row holds it.

    Args:
        input_ids (`ndarray[tokens]`, int64): the tokens, padding included.
        mask (`ndarray[tokens]`, bool): False where a token is padding.
        labels (`ndarray[tokens]`, int64, *optional*): what the row says should be predicted.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray | None = None

    def without_padding(self) -> Tokens:
        """Return the tokens that are no padding."""
        labels = None if self.labels is None else self.labels[self.mask]
        return Tokens(self.input_ids[self.mask], self.mask[self.mask], labels)

    def pieces(self, length: int) -> Iterator[Tokens]:
        """Yield the sequence in pieces of `length` tokens; the last one is as short as the sequence leaves it."""
        for start in range(0, len(self.input_ids), length):
            part = slice(start, start + length)
            labels = None if self.labels is None else self.labels[part]
            yield Tokens(self.input_ids[part], self.mask[part], labels)


def tokens_of(row: Mapping, column: str = "input_ids") -> Iterator[Tokens]:
    """Yield the sequences of a row: one, or where it is a padded batch `[sequences, tokens]` as many.

    Raises:
        UnusableRow: where there are no token ids, or a mask or labels of another length, or a mask that is none.
    """
    mask = labels = None
    input_ids = _numbers(row, column)
    # A row with several columns of token ids has the mask and the labels of the one with the usual name.
    if column == "input_ids" or "input_ids" not in row:
        mask, labels = _numbers(row, "attention_mask", "iubf"), _numbers(row, "labels")
    if input_ids is None or not input_ids.size:
        raise UnusableRow(f"{column} is empty")
    for name, values in (("attention_mask", mask), ("labels", labels)):
        if values is not None and values.shape != input_ids.shape:
            raise UnusableRow(f"{name} has the shape {list(values.shape)} and {column} {list(input_ids.shape)}")
    width = input_ids.shape[-1]
    table = input_ids.reshape(-1, width)
    masks = np.ones(table.shape, dtype=bool) if mask is None else present_tokens(mask).reshape(-1, width)
    for number in range(len(table)):
        yield Tokens(table[number], masks[number], None if labels is None else labels.reshape(-1, width)[number])


def present_tokens(mask: Array) -> Array:
    """Return which tokens are no padding, as bool: those where an attention mask of any dtype is not 0.

    Raises:
        UnusableRow: where it has numbers below 0 or no numbers, as one that is added to attention scores does.
    """
    if not (mask >= 0).all():
        raise UnusableRow(
            "attention_mask has values below 0, like a mask that is added to attention scores; give 1 for tokens and "
            "0 for padding"
        )
    return mask != 0


def check_table(values: Any, name: str) -> None:
    """Refuse tensors and arrays that are no sequences of numbers.

    Args:
        values: a tensor or array; anything else is left to whoever reads it.
        name (`str`): what it is, for the message.

    Raises:
        UnusableRow: where it has not one or two dimensions, or has no plain values, as a sparse tensor.
    """
    if isinstance(values, torch.Tensor):
        if values.is_nested or values.layout != torch.strided:
            raise UnusableRow(
                f"{name} is a sparse or nested tensor; give a dense one, such as of to_dense(), or lists"
            )
        if values.is_complex() or values.is_quantized:
            raise UnusableRow(f"{name} is a tensor of {values.dtype}; give whole numbers")
        if values.is_meta:
            raise UnusableRow(f"{name} is a tensor on the device meta, which holds no values")
    if isinstance(values, (torch.Tensor, np.ndarray)) and values.ndim not in (1, 2):
        raise UnusableRow(f"{name} has the shape {list(values.shape)}, not [tokens] or [sequences, tokens]")


def _numbers(row: Mapping, name: str, kinds: str = "iu") -> np.ndarray | None:
    """A column as numbers of some kinds of dtypes; `None` where it is missing."""
    values = row.get(name)
    if values is None:
        return None
    check_table(values, name)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # Arrays have no bfloat16.
        values = values.float() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UnusableRow(f"{name} has rows of different lengths") from error
    if array.size and array.dtype.kind in kinds:
        check_table(array, name)
    elif array.size:
        raise UnusableRow(f"{name} has no list of {'numbers' if 'f' in kinds else 'whole numbers'}")
    return array if "f" in kinds else array.astype(np.int64)
