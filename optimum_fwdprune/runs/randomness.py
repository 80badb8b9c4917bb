"""Random numbers: generators that depend on a seed alone, and restoring the states of the process's generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


def seeded_generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that is seeded by numbers; equal numbers lead to equal streams, others to unrelated ones."""
    import numpy as np
    import torch

    words = np.random.SeedSequence(numbers).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 ^ int(words[1]))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the states of the random number generators of Python, numpy and torch after the block."""
    import random

    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
