"""Devices: where modules compute, and computations in float64 on devices with and without it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn


def hooks_of(module: nn.Module) -> list[AlignDevicesHook]:
    """Return accelerate's hooks for the parameters that `module` itself holds."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def compute_device(module: nn.Module) -> torch.device:
    """Return the device that `module` computes on; for offloaded weights it differs from that of their storage."""
    parameter = next(module.parameters(), None)
    if parameter is not None and not parameter.is_meta:
        return parameter.device
    for part in module.modules():
        for hook in reversed(hooks_of(part)):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return torch.device("cpu")


def on_host(values: torch.Tensor) -> torch.Tensor:
    """Return `values` in host memory, which is pinned if the device supports it, so that copying back is fast."""
    if values.device.type == "cpu":
        return values
    pinned = values.device.type in ("cuda", "xpu")
    copied = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=pinned)
    return copied.copy_(values)


@functools.lru_cache(maxsize=64)
def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64; MPS and some others do not."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except torch.OutOfMemoryError:
        # The device is full, so that its dtypes are unknown. An answer would be cached.
        raise
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def precise_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums of values on `device`: itself, or the CPU if it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def precise(values: torch.Tensor) -> torch.Tensor:
    """Return `values` in float64 on their `precise_device`."""
    return values.to(precise_device(values.device)).double()


def precise_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of all `values`, `[]` float64, on their `precise_device`, without synchronizing the device.

    A device without float64 sums along the last dimension in the dtype of the values.
    """
    if has_float64(values.device):
        return values.sum(dtype=torch.float64)
    return precise(values.sum(-1)).sum()


def back_to(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `values` with the dtype and on the device of `like`."""
    # The dtype is converted first, since the device may not support float64.
    return values.to(like.dtype).to(like.device)


@contextmanager
def host_by_default() -> Iterator[None]:
    """Create tensors on the CPU by default while the context is open, also after `torch.set_default_device`."""
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield
