"""Linears whose weights are stored transposed, with the interface of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


class TransposedLinear(nn.Module):
    """A `Conv1D` of GPT-2 with the attributes of a linear.

    Its weight is a view, `[out_features, in_features]`, of the stored weight. Hooks and a `forward` that are set on it
    are set on the module, and hooks are called with this object as the module.

    Args:
        module (`Conv1D`): the module inside the model.
    """

    def __init__(self, module: Conv1D):
        super().__init__()
        self.module = module

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight.T

    @property
    def bias(self) -> torch.Tensor:
        return self.module.bias

    @property
    def in_features(self) -> int:
        return self.module.nx

    @property
    def out_features(self) -> int:
        return self.module.nf

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        return self.module.__call__

    @forward.setter
    def forward(self, replacement: Callable[..., Any]) -> None:
        self.module.forward = replacement  # type: ignore[method-assign]

    @forward.deleter
    def forward(self) -> None:
        del self.module.forward

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        return self.module.register_forward_hook(lambda _module, *args: hook(self, *args), **options)

    def register_forward_pre_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        return self.module.register_forward_pre_hook(lambda _module, *args: hook(self, *args), **options)


def as_linear(module: Any) -> Any:
    """Return a module of a decoder layer with the attributes of a linear."""
    return TransposedLinear(module) if isinstance(module, Conv1D) else module


@contextmanager
def forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, compute `forward` in the place of a module or `TransposedLinear`, without another change of
    the model.

    Hooks of the module are called as before, but not those of accelerate, which are part of its own `forward`.
    """
    module = module.module if isinstance(module, TransposedLinear) else module
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def stored_axis(linear: Any, parameter: str, axis: int) -> int:
    """Return the axis of a parameter as the model stores it.

    Args:
        linear (`nn.Linear` or `TransposedLinear`): the linear.
        parameter (`str`): `"weight"` or `"bias"`.
        axis (`int`): the axis in the linear, 0 for output rows.
    """
    return 1 - axis if parameter == "weight" and isinstance(linear, TransposedLinear) else axis


def as_stored(linear: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return a new weight of a linear, `[out_features, in_features]`, as the model stores it."""
    return weight.T.contiguous() if isinstance(linear, TransposedLinear) else weight
