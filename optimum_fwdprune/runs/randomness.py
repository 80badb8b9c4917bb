"""Random numbers: generators that a seed alone determines, and the states of the process left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


def seeded_generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that the numbers alone determine; equal numbers give equal streams, others unrelated ones."""
    import numpy as np
    import torch

    words = np.random.SeedSequence(numbers).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 ^ int(words[1]))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random number generators of Python, numpy and torch as they were before the block."""
    import random

    import numpy as np
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
