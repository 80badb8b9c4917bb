"""Sums over tokens of products of features. The matrix is symmetric, so that little more than half is computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


# Number of blocks of features, and the least number of features per block: products of smaller blocks are slower.
BLOCKS, SMALLEST_BLOCK = 8, 96


def add_products(total: torch.Tensor, values: torch.Tensor, in_bfloat16: bool = False) -> None:
    """Add Σ x xᵀ over tokens to `total`, without the blocks below the diagonal, which [`mirror`] sets at the end.

    This saves almost half of the time.

    Args:
        total (`Tensor[features, features]`): the sums, which are changed.
        values (`Tensor[tokens, features]`): the features x, in the dtype of the sums.
        in_bfloat16 (`bool`, defaults to `False`): whether float32 values are rounded to bfloat16 before they are
            multiplied, where that is faster; for values that were bfloat16 before this changes nothing.
    """
    with _multiplied(in_bfloat16):
        for start, stop in _blocks(values.shape[1]):
            total[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])


def add_cross_products(
    total: torch.Tensor, outputs: torch.Tensor, values: torch.Tensor, in_bfloat16: bool = False
) -> None:
    """Add Σ y xᵀ over tokens to `total`.

    Args:
        total (`Tensor[outputs, features]`): the sums, which are changed.
        outputs (`Tensor[tokens, outputs]`), values (`Tensor[tokens, features]`): y and x, in the dtype of the sums.
        in_bfloat16 (`bool`, defaults to `False`): as for [`add_products`].
    """
    with _multiplied(in_bfloat16):
        total.addmm_(outputs.T, values)


def mirror(total: torch.Tensor) -> torch.Tensor:
    """Set the blocks below the diagonal of the sums of [`add_products`] in place, and return these sums."""
    for start, stop in _blocks(len(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _blocks(features: int) -> Iterator[tuple[int, int]]:
    """Yield the first feature of every block and the one after its last."""
    count = max(1, min(BLOCKS, features // SMALLEST_BLOCK))
    bounds = [features * block // count for block in range(count + 1)]
    yield from itertools.pairwise(bounds)


@contextmanager
def _multiplied(in_bfloat16: bool) -> Iterator[None]:
    """Within the context, let the CPU multiply float32 matrices in bfloat16, with float32 sums, if it is asked to."""
    # PyTorch has the switch since version 2.9. It has no effect on cores without such instructions.
    switch = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
    if not in_bfloat16 or switch is None:
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before
