"""How a decoder layer connects its norms, sublayers and the residual stream, by following one forward pass.

The pass runs on any device, the meta device included: which tensors go where is recorded, and not their values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


# Operations that keep the values of a tensor, and those that multiply it by a number or add it to another one.
_SAME = {"view", "_unsafe_view", "reshape", "clone", "_to_copy", "alias", "detach", "unsqueeze", "squeeze", "expand"}
_TIMES, _OVER = {"mul", "mul_"}, {"div", "div_"}
_PLUS = {"add", "add_"}


@dataclass(frozen=True)
class LayerFlow:
    """What the forward pass of a decoder layer does around its sublayers.

    Args:
        norms (`dict[str, tuple[str, ...]]`): kind of a sublayer -> the norms of the layer that only it uses, those of
            its output last.
        output_norm (`bool`): whether the outputs of both sublayers are normalized before they are added to the stream.
        multiplier (`float`): the number by which these outputs are multiplied before they are added.
        normalizes_stream (`bool`): whether the residual stream itself is normalized.
        adds_up (`bool`): whether the stream is the sum of what enters it and of the outputs times `multiplier`.
    """

    norms: dict[str, tuple[str, ...]]
    output_norm: bool
    multiplier: float
    normalizes_stream: bool
    adds_up: bool


def follow_layer(
    model: PreTrainedModel,
    layer: nn.Module,
    sources: Mapping[str, Sequence[str]],
    outputs: Mapping[str, str],
) -> LayerFlow:
    """Follow a forward pass of `model` through one of its decoder layers.

    Args:
        model (`PreTrainedModel`): a dense model on any device.
        layer (`Module`): the decoder layer.
        sources (mapping of `str` to sequence of `str`): kind of a sublayer -> names of its first linears.
        outputs (mapping of `str` to `str`): kind of a sublayer -> name of its output projection.

    Raises:
        ValueError: where the model cannot be run, or a sublayer is not; the message has the reason.
    """
    linears = [name for names in sources.values() for name in names] + list(outputs.values())
    norms = {name: module for name, module in layer.named_modules() if _is_norm(name, module, linears)}
    trace = _Trace()
    with _hooks(layer, norms, sources, outputs, trace):
        _run(_around(model, layer), trace)
    return trace.result(list(norms), tuple(outputs))


def _is_norm(name: str, module: nn.Module, linears: Collection[str]) -> bool:
    """Whether a module inside a decoder layer is a norm outside of the modules of attention and MLP."""
    owner, _, _ = name.rpartition(".")
    inside = any(linear.startswith(f"{owner}.") for linear in linears) if owner else False
    return "norm" in type(module).__name__.lower() and not inside and not list(module.children())


@dataclass(frozen=True)
class _Output:
    """The output of a sublayer on its way to the residual stream: the norms that it passed, and the number by which it
    was multiplied, which is NaN after an operation that is not a multiplication by a number."""

    kind: str
    norms: tuple[str, ...] = ()
    factor: float = 1.0


class _Trace(TorchDispatchMode):
    """Which tensors are norms of the stream, outputs of sublayers, or the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.restart()

    def restart(self) -> None:
        """Forget what was recorded."""
        self.reads: dict[str, set[str]] = {}
        self.joined: list[_Output] = []
        self.recording, self.normalizes_stream, self.adds_up = False, False, True
        self._stream: set[int] = set()
        self._normed: dict[int, str] = {}
        self._outputs: dict[int, tuple[_Output, ...]] = {}
        # The tensors are kept, so that no other one gets the id of one of them.
        self._tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.recording and isinstance(result, torch.Tensor):
            self._tensors.append(result)
            self._follow(func.overloadpacket.__name__, args, kwargs or {}, result)
        return result

    def enters(self, tensor: torch.Tensor) -> None:
        self.recording = True
        self._tensors.append(tensor)
        self._stream.add(id(tensor))

    def leaves(self, tensor: torch.Tensor) -> None:
        self.recording = False
        self.normalizes_stream |= id(tensor) in self._normed

    def read_by(self, kind: str, inputs: torch.Tensor, _outputs: torch.Tensor) -> None:
        """Note what the first linear of a sublayer reads."""
        self.reads.setdefault(kind, set())
        if id(inputs) in self._normed:
            self.reads[kind].add(self._normed[id(inputs)])

    def written_by(self, kind: str, _inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Note what the output projection of a sublayer writes."""
        self._tensors.append(outputs)
        self._outputs[id(outputs)] = (_Output(kind),)

    def norm(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Note what a norm reads, and forget what the operations inside it did."""
        self._tensors.append(outputs)
        before = self._outputs.get(id(inputs), ())
        self._forget(outputs)
        if before:
            self._outputs[id(outputs)] = tuple(replace(one, norms=(*one.norms, name)) for one in before)
        else:
            self._normed[id(outputs)] = name

    def _forget(self, tensor: torch.Tensor) -> None:
        self._outputs.pop(id(tensor), None)
        self._normed.pop(id(tensor), None)
        self._stream.discard(id(tensor))

    def _follow(self, operation: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor) -> None:
        tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
        if operation in _PLUS and len(tensors) == 2:
            self._add(tensors, float(kwargs.get("alpha", 1)), result)
            return
        found = [self._outputs[id(tensor)] for tensor in tensors if id(tensor) in self._outputs]
        if operation in _SAME:
            if id(tensors[0]) in self._normed:
                self._normed[id(result)] = self._normed[id(tensors[0])]
            if found:
                self._outputs[id(result)] = found[0]
            if id(tensors[0]) in self._stream:
                self._stream.add(id(result))
        elif found:
            factor = float("nan")
            if operation in _TIMES | _OVER and len(tensors) == 1 and isinstance(args[1], (int, float)):
                factor = args[1] if operation in _TIMES else 1 / args[1]
            self._outputs[id(result)] = tuple(
                replace(one, factor=one.factor * factor) for of_tensor in found for one in of_tensor
            )

    def _add(self, tensors: Sequence[torch.Tensor], alpha: float, result: torch.Tensor) -> None:
        first, second = (self._outputs.get(id(tensor), ()) for tensor in tensors)
        second = tuple(replace(one, factor=one.factor * alpha) for one in second)
        if first and second:
            # Attention and MLP side by side are added before they are added to the stream.
            self._outputs[id(result)] = (*first, *second)
        elif first or second:
            other = tensors[1] if first else tensors[0]
            self.joined += first or second
            self.normalizes_stream |= id(other) in self._normed
            self.adds_up &= id(other) in self._stream
            self._stream.add(id(result))

    def result(self, norms: Sequence[str], kinds: Sequence[str]) -> LayerFlow:
        """Return what was recorded for a layer with these norms and sublayers."""
        if sorted(one.kind for one in self.joined) != sorted(kinds) or self.reads.keys() != set(kinds):
            raise ValueError("the outputs of attention and MLP are not each added to the residual stream once")
        users = {
            name: {kind for kind in kinds if name in self.reads[kind]}
            | {one.kind for one in self.joined if name in one.norms}
            for name in norms
        }
        after = [name for one in self.joined for name in one.norms]
        factors = {one.factor for one in self.joined}
        normed = [bool(one.norms) for one in self.joined]
        # A factor of NaN differs from itself.
        same = len(factors) == 1 and all(factor == factor for factor in factors)
        return LayerFlow(
            norms={
                kind: tuple(name for name in sorted(norms, key=after.__contains__) if users[name] == {kind})
                for kind in kinds
            },
            output_norm=all(normed),
            multiplier=factors.pop() if same else 1.0,
            normalizes_stream=self.normalizes_stream,
            adds_up=self.adds_up and same and not any(normed) and not self.normalizes_stream,
        )


class _Finished(Exception):
    """Ends the forward pass after the layer."""


@contextmanager
def _hooks(
    layer: nn.Module,
    norms: Mapping[str, nn.Module],
    sources: Mapping[str, Sequence[str]],
    outputs: Mapping[str, str],
    trace: _Trace,
) -> Iterator[None]:
    """Tell `trace` of the tensors that enter and leave the modules of a layer."""

    def after(module: nn.Module, note: Callable[[torch.Tensor, torch.Tensor], None]) -> RemovableHandle:
        return module.register_forward_hook(
            lambda _module, args, kwargs, result: note(_first((args, kwargs)), _first(result)), with_kwargs=True
        )

    def finish(_inputs: torch.Tensor, result: torch.Tensor) -> None:
        trace.leaves(result)
        raise _Finished

    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs: trace.enters(_first((args, kwargs))), with_kwargs=True
        )
    ]
    for name, norm in norms.items():
        handles.append(after(norm, partial(trace.norm, name)))
    for kind, names in sources.items():
        for name in names:
            handles.append(after(layer.get_submodule(name), partial(trace.read_by, kind)))
    for kind, name in outputs.items():
        handles.append(after(layer.get_submodule(name), partial(trace.written_by, kind)))
    handles.append(after(layer, finish))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(values: Any) -> torch.Tensor:
    return next(value for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def _around(model: PreTrainedModel, layer: nn.Module) -> PreTrainedModel:
    """Return the innermost model that has the layer: the language model of a multimodal one."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return next(part for part in reversed(parts) if any(module is layer for module in part.modules()))


def _run(model: PreTrainedModel, trace: _Trace) -> None:
    """Run a model on four tokens until the layer has been run."""
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
    # Values cannot be read on the meta device, as the making of a mask does. Most models take one that is made. Others
    # work with a mask of tokens, or without any.
    masks = (torch.zeros(1, 1, 4, 4, dtype=model.dtype, device=model.device), torch.ones_like(tokens), None)
    was_training = model.training
    model.eval()
    reasons: list[str] = []
    try:
        for mask in masks:
            trace.restart()
            try:
                with torch.no_grad(), trace:
                    model(input_ids=tokens, attention_mask=mask, use_cache=False)
            except _Finished:
                return
            except Exception as error:  # Any code may run here, that of a repository included.
                reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        model.train(was_training)
    raise ValueError(reasons[0] if reasons else "the layer was not run")
