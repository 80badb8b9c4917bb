"""Masks over the experts of a mixture, which are applied to the scores by which its router chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..architectures import Site
from ..architectures.routing import Routing


# How a sum is called in Python code.
_SUMS = ("add", "__add__", "__radd__")


def gate_experts(site: Site, mask: torch.Tensor, on_call: Callable[[], None]) -> list[RemovableHandle]:
    """Register hooks that add the logarithms of the gates of a site's experts to the scores by which its router
    chooses, -∞ for a closed one, and return their handles.

    The other experts take the place of a closed one, as they do once it is removed. In sequences in which all gates
    are closed, the scores are not changed.

    Args:
        site (`Site`): a site whose units are experts.
        mask (`Tensor`): gates, float or bool, `[num_units]` or `[batch_size, num_units]`.
        on_call (`Callable`): is called whenever the router runs.
    """
    assert site.routing is not None
    added = mask.to(torch.float32).log()
    added = torch.where(mask.bool().any(-1, keepdim=True), added, 0.0)
    router, modes = site.routing.router, list[_ChoiceMode]()

    def enter(_module: Any, _args: Any) -> None:
        on_call()
        modes.append(_ChoiceMode(site.routing, added))  # type: ignore[arg-type]
        modes[-1].__enter__()

    def leave(_module: Any, _args: Any, output: Any) -> None:
        mode = modes.pop()
        mode.__exit__(None, None, None)
        # The output is missing where the router raised an error.
        if output is not None and mode.times != 1:
            raise RuntimeError(
                f"The router of the {site} computed the scores by which it chooses experts {mode.times} times and not "
                f"once, so that its gates had no effect. Please report this {type(router).__name__} as a bug."
            )

    return [router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True)]


def replace_experts(site: Site, kept: list[int], weight: torch.Tensor) -> list[RemovableHandle]:
    """Register hooks that let the kept experts of a site use new output projections, and return their handles.

    The parameter of the model is exchanged while the experts run. Its values must be in memory then. The other experts
    have the projection 0, and take no memory of the host.

    Args:
        site (`Site`): a site whose units are experts.
        kept (`list[int]`): the kept experts.
        weight (`Tensor[kept, ...]`): their output projections as the model stores them.
    """
    assert site.routing is not None
    experts, name = site.routing.experts, site.routing.output_name
    changed: list[torch.nn.Parameter] = []
    replaced: list[Any] = []

    def enter(_module: Any, _args: Any) -> None:
        own: Any = experts._parameters[name]
        if not changed:
            values = torch.zeros(own.shape, dtype=own.dtype, device=own.device)
            values[kept] = weight.to(values)
            changed.append(torch.nn.Parameter(values, requires_grad=False))
        replaced.append(own)
        experts._parameters[name] = changed[0]

    def leave(_module: Any, _args: Any, _output: Any) -> None:
        experts._parameters[name] = replaced.pop()

    return [experts.register_forward_pre_hook(enter), experts.register_forward_hook(leave, always_call=True)]


class _ChoiceMode(TorchFunctionMode):
    """Adds numbers to the scores by which a router chooses experts, as long as it is entered.

    These are the outputs of the router's linear, or the sum with its correction where it has one. No other function
    of the router is known to it.

    Args:
        routing (`Routing`): the router.
        added (`Tensor`): the numbers, `[num_experts]` or `[batch_size, num_experts]`, float32.

    Attributes:
        times (`int`): how often scores were computed.
    """

    def __init__(self, routing: Routing, added: torch.Tensor):
        super().__init__()
        self._routing, self._added = routing, added
        self.times = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._makes_scores(func, args):
            return result
        self.times += 1
        added = self._added.to(result.device, result.dtype)
        # Routers flatten the sequences of a batch.
        per_sequence = result.reshape(len(added) if added.dim() > 1 else 1, -1, result.shape[-1])
        return (per_sequence + (added[:, None] if added.dim() > 1 else added)).view_as(result)

    def _makes_scores(self, func: Any, args: tuple[Any, ...]) -> bool:
        if not self._routing.correction:
            return func is F.linear
        # The buffer is looked up here, since offloaded ones are loaded when the router runs.
        correction = getattr(self._routing.router, self._routing.correction)
        return getattr(func, "__name__", "") in _SUMS and any(arg is correction for arg in args)


def contributions(
    experts: Any, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Return the router weight times the L2 norm of an expert's output, for every token and expert; 0 where a token is
    not routed to the expert.

    Every expert of a token runs once more, alone and with a weight of 1.

    Args:
        experts (`nn.Module`): the module with all experts, which is called as by the mixture.
        hidden (`Tensor[tokens, hidden]`): its inputs.
        indices (`Tensor[tokens, chosen]`, int64): the experts of every token.
        weights (`Tensor[tokens, chosen]`): their weights.
        num_experts (`int`): number of experts.

    Returns:
        `Tensor[tokens, num_experts]`, float32.
    """
    tokens, chosen = indices.shape
    alone = indices.reshape(-1, 1)
    # Hooks that watch the module are not called.
    outputs = experts.forward(hidden.repeat_interleave(chosen, 0), alone, torch.ones_like(weights).reshape(-1, 1))
    norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).view(tokens, chosen)
    values = norms.new_zeros(tokens, num_experts)
    return values.scatter_(1, indices, norms * weights.float())
