"""Clocks for the stages of a run, and for functions on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .progress import progress


if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class StageClock:
    """Measures the seconds that stages of a run take.

    Attributes:
        seconds (`dict[str, float]`): seconds of every stage so far, by its name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a stage, including work of the accelerator that it started."""
        import torch

        start = time.perf_counter()
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def each_in(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and add the time that the iterator takes to a stage."""
        iterator, end = iter(items), object()
        while True:
            with self.stage(name):
                item: Any = next(iterator, end)
            if item is end:
                return
            yield item


def median_seconds(runs: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """Return the median seconds of every run, without a first one that warms up.

    The runs take turns, so that other load on the machine slows all of them. Compare results of one call only.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    turns = [turn for _ in range(repeats + 1) for turn in zip(runs, seconds)]
    for run, taken in progress(turns, "Timing", unit="run"):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    # The first run warms up kernels and caches, and is not counted.
    return [statistics.median(taken[1:]) for taken in seconds]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that a clock includes it."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
