"""The device under test: waiting for it, its memory, and what it is. Does nothing on a CPU, and little on others."""

import gc
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch


GIB = 2**30
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "optimum-fwdprune")


class Device:
    """A device by its name, such as `cuda`, `cuda:1`, `xpu`, `mps` or `cpu`."""

    def __init__(self, name: str):
        self.torch = torch.device(name)
        self.is_cpu = self.torch.type == "cpu"
        # torch.cuda, torch.xpu, ...: not all of them have all functions.
        self._module = None if self.is_cpu else torch.get_device_module(self.torch)
        self._open_stages: list[list[int]] = []

    @property
    def count(self) -> int:
        """Devices of this type."""
        return self._call("device_count") or 1

    @property
    def name(self) -> str:
        """With its index, as device maps name it."""
        return "cpu" if self.is_cpu else f"{self.torch.type}:{self.torch.index or 0}"

    def other(self) -> torch.device:
        """A second device of this type."""
        return torch.device(self.torch.type, 1 if self.torch.index in (None, 0) else 0)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        self._call("synchronize")

    def free(self) -> None:
        """Give back the memory of what nobody holds any more."""
        gc.collect()
        self._call("empty_cache")

    def answers(self) -> bool:
        """Whether the device still computes: after some errors of a kernel it does not in this process."""
        try:
            return float(torch.ones(2, device=self.torch).sum()) == 2
        except RuntimeError:
            return False

    def random_states(self) -> list[torch.Tensor]:
        """The states of the generators that draw where no other is named: the CPU's and the device's."""
        own = getattr(self._module, "get_rng_state", None)
        return [torch.get_rng_state(), *([] if own is None else [own(self.torch)])]

    def reset_peak(self) -> None:
        """Forget the largest amount of memory so far."""
        self._call("reset_peak_memory_stats")

    def peak(self) -> int | None:
        """Bytes that were allocated at most since `reset_peak`; `None` where the device does not tell."""
        peak = self._call("max_memory_allocated")
        return None if peak is None else int(peak)

    def _call(self, name: str):
        function = getattr(self._module, name, None)
        # Where the index is named, it may be another one than the current device's.
        index = [] if self.torch.index is None or name in ("empty_cache", "device_count") else [self.torch]
        return None if function is None else function(*index)

    def _properties(self):
        function = getattr(self._module, "get_device_properties", None)
        return None if function is None else function(self.torch)

    @contextmanager
    def limited_memory(self, limit: float | None) -> Iterator[bool]:
        """Let this process have so many GiB of the device's memory in the block; yields whether it is limited."""
        total = getattr(self._properties(), "total_memory", None)
        if limit is None or total is None or not hasattr(self._module, "set_per_process_memory_fraction"):
            yield False
            return
        self.free()
        self._module.set_per_process_memory_fraction(min(1.0, limit * GIB / total))
        try:
            yield True
        finally:
            self._module.set_per_process_memory_fraction(1.0)

    @contextmanager
    def peaks_by_stage(self, peaks: dict[str, int]) -> Iterator[None]:
        """Write the largest amount of memory of every stage of a pruning into `peaks`, in bytes.

        Stages also wait for the device in the block, so that their seconds are their own.
        """
        from optimum_fwdprune.runs.clock import StageClock

        original = StageClock.stage
        StageClock.stage = self._measuring(original, peaks)
        try:
            yield
        finally:
            StageClock.stage = original

    def _measuring(self, timed, peaks: dict[str, int]):
        @contextmanager
        def measuring(clock, stage):
            self._note_peak()
            self._open_stages.append([0])
            with timed(clock, stage):
                try:
                    yield
                finally:
                    self._note_peak()
                    (highest,) = self._open_stages.pop()
                    peaks[stage] = max(peaks.get(stage, 0), highest)
                self.synchronize()

        return measuring

    def _note_peak(self) -> None:
        """Credit every open stage with the peak since the last look."""
        peak = self.peak() or 0
        for stage in self._open_stages:
            stage[0] = max(stage[0], peak)
        self.reset_peak()

    def environment(self) -> dict:
        """Versions, and the device by name and size, as JSON values."""
        found = {name: _version(name) for name in PACKAGES}
        found |= {"python": platform.python_version(), "system": platform.platform(), "device": str(self.torch)}
        if self.is_cpu:
            return {**found, "name": platform.machine(), "threads": torch.get_num_threads()}
        properties = self._properties()
        found |= {
            "name": getattr(properties, "name", str(self.torch)),
            "memory_bytes": getattr(properties, "total_memory", None),
            "capability": f"{getattr(properties, 'major', '?')}.{getattr(properties, 'minor', '?')}",
            "count": self.count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
            "driver": _driver() if self.torch.type == "cuda" else None,
        }
        return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of the NVIDIA driver, by the tool that comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
