"""Sequences of token ids in rows, tensors and arrays, with their padding and labels."""

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
    """The sequence of tokens of a row.

    Args:
        input_ids (`ndarray[tokens]`, int64): the tokens, padding included.
        mask (`ndarray[tokens]`, bool): False where a token is padding.
        labels (`ndarray[tokens]`, int64, *optional*): the row's labels.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray | None = None

    def without_padding(self) -> Tokens:
        """Return the sequence without its padding."""
        labels = None if self.labels is None else self.labels[self.mask]
        return Tokens(self.input_ids[self.mask], self.mask[self.mask], labels)

    def pieces(self, length: int) -> Iterator[Tokens]:
        """Yield the sequence in pieces of `length` tokens, of which the last one may be shorter."""
        for start in range(0, len(self.input_ids), length):
            part = slice(start, start + length)
            labels = None if self.labels is None else self.labels[part]
            yield Tokens(self.input_ids[part], self.mask[part], labels)


# Columns that processors of multimodal models make of images, videos and sound.
NOT_TEXT = ("pixel_values", "pixel_values_videos", "input_features")


def check_only_text(row: Mapping) -> None:
    """Raise `ValueError` where a row of token ids comes with an image, a video or sound, which would be ignored."""
    for column in NOT_TEXT:
        if row.get(column) is not None:
            raise ValueError(
                f"The data has {column} beside input_ids. Images are read for calibration alone, of rows in a list or "
                f"a datasets.Dataset. Leave out the rows with images, videos or sound, or pass text."
            )


def tokens_of(row: Mapping, column: str = "input_ids") -> Iterator[Tokens]:
    """Yield the sequences of a row: a single one, or all of a padded batch `[sequences, tokens]`.

    Raises:
        UnusableRow: where there are no token ids, the mask or the labels have another shape, or the mask is invalid.
    """
    check_only_text(row)
    mask = labels = None
    input_ids = _numbers(row, column)
    # In a row with several columns of token ids, the mask and the labels belong to `input_ids`.
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
        UnusableRow: where the mask has negative values or NaN, like masks that are added to attention scores.
    """
    if not (mask >= 0).all():
        raise UnusableRow(
            "attention_mask has values below 0, like a mask that is added to attention scores; it must be 1 for "
            "tokens and 0 for padding"
        )
    return mask != 0


def check_table(values: Any, name: str) -> None:
    """Refuse tensors and arrays that are no sequences of numbers.

    Args:
        values: a tensor or array; other values are not checked.
        name (`str`): its name in the message.

    Raises:
        UnusableRow: where it does not have one or two dimensions, or is a special kind of tensor such as a sparse one.
    """
    if isinstance(values, torch.Tensor):
        if values.is_nested or values.layout != torch.strided:
            raise UnusableRow(
                f"{name} is a sparse or nested tensor; pass a dense one, for example by to_dense(), or lists"
            )
        if values.is_complex() or values.is_quantized:
            raise UnusableRow(f"{name} is a tensor of {values.dtype}; pass integers")
        if values.is_meta:
            raise UnusableRow(f"{name} is a tensor on the meta device, which has no values")
    if isinstance(values, (torch.Tensor, np.ndarray)) and values.ndim not in (1, 2):
        raise UnusableRow(f"{name} has the shape {list(values.shape)}, not [tokens] or [sequences, tokens]")


def _numbers(row: Mapping, name: str, kinds: str = "iu") -> np.ndarray | None:
    """Return a column as an array of one of some kinds of dtypes; `None` where it is missing."""
    values = row.get(name)
    if values is None:
        return None
    check_table(values, name)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.float() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UnusableRow(f"{name} has rows of different lengths") from error
    if array.size and array.dtype.kind in kinds:
        check_table(array, name)
    elif array.size:
        raise UnusableRow(f"{name} is not a list of {'numbers' if 'f' in kinds else 'integers'}")
    return array if "f" in kinds else array.astype(np.int64)
