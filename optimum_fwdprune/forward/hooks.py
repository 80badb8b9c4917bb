"""Watching modules during a forward pass: what goes in, what comes out, and an end before a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Stop(Exception):
    """Ends a forward pass in front of a module.

    Args:
        inputs (`Tensor`): what would have gone into it.
    """

    inputs: torch.Tensor


@contextmanager
def stopped_before(module: nn.Module) -> Iterator[Stop]:
    """End the forward pass in the block where `module` would be called, and tell what it would be called with."""
    stop = Stop()

    def hook(_module, args, kwargs):
        stop.inputs = args[0] if args else kwargs["hidden_states"]
        raise stop

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield stop
    except Stop as reached:
        # Its frames hold this very exception, so they would hold the layer's activations until a garbage collection.
        reached.__traceback__ = None
        if reached is not stop:
            raise
    finally:
        handle.remove()


def outputs_of(modules: Iterable[nn.Module]) -> AbstractContextManager[list[torch.Tensor]]:
    """Gather what the modules return in the block, in the order in which they are called."""
    return _gathering(
        modules, lambda module, seen: module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    )


def inputs_of(modules: Iterable[nn.Module]) -> AbstractContextManager[list[torch.Tensor]]:
    """Gather what the modules are called with in the block, in the order in which they are called."""
    return _gathering(
        modules, lambda module, seen: module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    )


@contextmanager
def _gathering(
    modules: Iterable[nn.Module], watch: Callable[[nn.Module, list[torch.Tensor]], RemovableHandle]
) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    handles = [watch(module, seen) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
