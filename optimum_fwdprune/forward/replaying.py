"""Leaving out the attention or MLP of a layer whose output is known already."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architectures import Site


def sublayer_of(model: nn.Module, site: Site) -> nn.Module:
    """Return the smallest module of `model` that contains all linears of a site; it may be the whole layer."""
    paths = [coupling.name.split(".") for coupling in (*site.couplings, *site.shared)]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
    return model.get_submodule(".".join(parts[0] for parts in common))


@dataclass(frozen=True)
class PassedOn:
    """A sublayer whose output is the output of its projection, alone or followed by `None`s in a tuple.

    Args:
        sublayer (`Module`): the module of the attention or MLP.
        shape (`torch.Size`): the shape of its output.
        others (`int`): the number of `None`s after the output; -1 where the output is no tuple.
    """

    sublayer: nn.Module
    shape: torch.Size
    others: int

    def forward(self, output: torch.Tensor) -> Callable[..., Any]:
        """Return a `forward` of the sublayer that returns a known output of the projection."""
        output = output.view(self.shape)
        result = output if self.others < 0 else (output, *[None] * self.others)
        return lambda *_args, **_kwargs: result


def passed_on(sublayer: nn.Module, output: torch.Tensor, result: Any) -> PassedOn | None:
    """Return how a sublayer passes on the output of its projection, or `None` where it returns something else.

    Args:
        sublayer (`Module`): the module of the attention or MLP.
        output (`Tensor`): the output of the projection in a forward pass.
        result: the output of the sublayer in this pass.
    """
    whole, *others = result if isinstance(result, tuple) else (result,)
    if not isinstance(whole, torch.Tensor) or any(other is not None for other in others):
        return None
    if whole.data_ptr() != output.data_ptr() or whole.numel() != output.numel():
        return None
    return PassedOn(sublayer, whole.shape, len(others) if isinstance(result, tuple) else -1)
