"""One clock for everything that is timed: layers, models, generation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .progress import progress


if TYPE_CHECKING:
    import torch


def median_seconds(runs: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Return the median seconds of each run after one to warm up.

    They take turns, so that whatever else the machine does slows them all: compare the results of one call.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    turns = [turn for _ in range(repeats + 1) for turn in zip(runs, seconds)]
    for run, taken in progress(turns, "Timing", unit="run"):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    # The first run pays for kernels and caches.
    return [statistics.median(taken[1:]) for taken in seconds]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
