"""Sums over tokens of products of features. The matrix is symmetric, so that little more than half is computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch


# Number of blocks of features, and the least number of features per block: products of smaller blocks are slower.
BLOCKS, SMALLEST_BLOCK = 8, 96


def add_products(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add Σ x xᵀ over tokens to `total`, without the blocks below the diagonal, which [`mirror`] sets at the end.

    This saves almost half of the time.

    Args:
        total (`Tensor[features, features]`): the sums, which are changed.
        values (`Tensor[tokens, features]`): the features x, in the dtype of the sums.
    """
    for start, stop in _blocks(values.shape[1]):
        total[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])


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
