"""The peak memory of a block of code."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Measures the largest growth of memory while the context is open.

    On CUDA it measures the memory that torch's allocator hands out, elsewhere the resident size of the process: on
    Linux the kernel records its maximum, on other systems it is sampled a hundred times a second. Memory that the
    process freed before but still holds would be reused without a growth, so that it is returned to the system first
    where the C library allows it (glibc).

    Args:
        device (`torch.device`): device that the block runs on.

    Attributes:
        bytes (`int`): the largest growth, once the context is closed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        _return_free_memory()
        self._before = self._highest = _resident()
        self._sampler = None if _reset_high_water() else threading.Thread(target=self._sample, daemon=True)
        self._done = threading.Event()
        if self._sampler:
            self._sampler.start()
        return self

    def __exit__(self, *_error) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        if self._sampler:
            self._done.set()
            self._sampler.join()
        else:
            self._highest = _high_water()
        self.bytes = max(0, self._highest - self._before)

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self._highest = max(self._highest, _resident())


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _return_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    """Reset the kernel's maximum of the resident size; `False` where there is none or this is not permitted."""
    try:
        _CLEAR.write_text("5")
        return "VmHWM" in _STATUS.read_text()
    except OSError:
        return False


def _high_water() -> int:
    return 1024 * int(_STATUS.read_text().partition("VmHWM:")[2].split()[0])
