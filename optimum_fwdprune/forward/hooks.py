"""Hooks for a forward pass: inputs and outputs of modules, and stopping before a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Stop(Exception):
    """Ends a forward pass before a module is called.

    Args:
        inputs (`Tensor`): the inputs that the module would have been called with.
    """

    inputs: torch.Tensor


@contextmanager
def stopped_before(module: nn.Module) -> Iterator[Stop]:
    """Within the context, end the forward pass before `module` is called, and store the inputs of the call."""
    stop = Stop()

    def hook(_module, args, kwargs):
        stop.inputs = args[0] if args else kwargs["hidden_states"]
        raise stop

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield stop
    except Stop as reached:
        # The frames refer to this exception, so that the layer's activations would stay until a garbage collection.
        reached.__traceback__ = None
        if reached is not stop:
            raise
    finally:
        handle.remove()


def outputs_of(modules: Iterable[nn.Module]) -> AbstractContextManager[list[Any]]:
    """Within the context, collect the outputs of modules, in the order of their calls."""
    return _gathering(
        modules, lambda module, seen: module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    )


def written_by(modules: Iterable[nn.Module]) -> AbstractContextManager[list[torch.Tensor]]:
    """Within the context, collect what modules write to the residual stream: their outputs, or, of mixtures that
    return the weights of their experts too, the first of these."""
    return _gathering(
        modules,
        lambda module, seen: module.register_forward_hook(
            lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        ),
    )


def inputs_of(modules: Iterable[nn.Module]) -> AbstractContextManager[list[torch.Tensor]]:
    """Within the context, collect the first inputs of modules, in the order of their calls."""
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


@contextmanager
def leaves_of(linears: Iterable[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Within the context, collect the outputs of `linears` as leaves of the graph, so that later computations, and no
    earlier ones, can be differentiated with respect to them."""
    before, leaves = torch.is_grad_enabled(), {}

    def hook(module, _args, output):
        # Outputs are copied, since gradients with respect to tensors of inference mode are impossible.
        leaves[module] = output.detach().clone().requires_grad_()
        torch.set_grad_enabled(True)
        return leaves[module]

    handles = [linear.register_forward_hook(hook) for linear in linears]
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield leaves
    finally:
        torch.set_grad_enabled(before)
        for handle in handles:
            handle.remove()
