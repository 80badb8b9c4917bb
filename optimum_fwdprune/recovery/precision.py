"""Dtypes of a training: weights in float32, since 16 bits round most updates to zero, and products in bfloat16 where
that is faster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_fast_in_bfloat16(on_cpu: bool) -> bool:
    """Return whether the CPU, or else CUDA, multiplies matrices of bfloat16 faster than those of float32."""
    if not on_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # Older versions of PyTorch do not tell.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


def float32_while_trained(module: nn.Module):
    """Keep all parameters of a module in float32 while the context is open, also frozen ones, which its trained ones
    are multiplied with."""
    return _in_float32(module.parameters())


def trained_in_float32(model: nn.Module):
    """Keep trained parameters of a model in float32 while the context is open."""
    return _in_float32(parameter for parameter in model.parameters() if parameter.requires_grad)


@contextmanager
def _in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    held = [(parameter, parameter.dtype) for parameter in parameters]
    # Buffers are not changed: those such as rotary frequencies are float32 whatever the model's dtype.
    for parameter, dtype in held:
        if dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in held:
            parameter.data = parameter.data.to(dtype)
