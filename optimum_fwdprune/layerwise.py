"""Calibration windows carried through a model one decoder layer at a time, so that a layer may change under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import get_architecture
from .calibration import Calibration


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


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Gather what the modules return in the block, in the order in which they are called."""
    seen: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda _module, _args, output: seen.append(output)) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Batch:
    """Some windows on their way through the model.

    Args:
        input_ids (`Tensor[windows, tokens]`, int64): the tokens.
        attention_mask (`Tensor[windows, tokens]`, *optional*): 0 where a token is padding.
        hidden (`Tensor[windows, tokens, hidden]`): what goes into the next layer.
        arguments (`list[tuple[tuple, dict]]`): what else every layer is called with.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    hidden: torch.Tensor
    arguments: list[tuple[tuple, dict[str, Any]]]

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Flatten `[windows, tokens, features]`, or what is flat already, to `[tokens, features]` without padding."""
        values = values.flatten(0, -2)
        return (
            values if self.attention_mask is None else values[self.attention_mask.bool().flatten().to(values.device)]
        )


class _StandIn(nn.Module):
    """Stands for a decoder layer that does not run; all but its output is the layer's own.

    Args:
        layer (`nn.Module`): the layer.
        output (`Callable`): called with what the layer would be called with, returns what it would return.
    """

    def __init__(self, layer: nn.Module, output: Callable[..., Any]):
        super().__init__()
        # Not as attributes of a module, which would make the layer a part of this one.
        self.__dict__.update(_layer=layer, _output=output)

    def forward(self, *args, **kwargs):
        return self._output(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class LayerRunner:
    """Runs decoder layers of `model` by themselves, called with what the whole model would call them with.

    Args:
        model (`PreTrainedModel`): the model; the rest of it must be in memory.
        resident (`Callable[[int], ContextManager]`, *optional*): what has a layer's parameters in memory while its
            context is open, for layers that are not.
    """

    def __init__(self, model: PreTrainedModel, resident: Callable[[int], AbstractContextManager] | None = None):
        self._model = model
        self.resident = resident or (lambda _layer: nullcontext())
        named = get_architecture(model.config).layers(model)
        self.layers = [layer for _, layer in named]
        self._container: Any = model.get_submodule(named[0][0].rpartition(".")[0])
        self._as_tuple = False

    @torch.no_grad()
    def batches(self, calibration: Calibration, batch_size: int) -> list[Batch]:
        """Return the windows in front of the first layer."""
        found = []
        arguments: dict[tuple[int, ...], list] = {}
        for windows in torch.arange(len(calibration.input_ids)).split(batch_size):
            input_ids, mask = calibration.windows(windows)
            # Unpadded batches of one size are called alike; padding is what makes them differ.
            shape = tuple(input_ids.shape)
            if mask is not None or shape not in arguments:
                arguments[shape] = self._arguments(input_ids, mask)
            found.append(Batch(input_ids, mask, self._embed(input_ids, mask), arguments[shape]))
        return found

    def run(self, layer: int, batch: Batch) -> torch.Tensor:
        """Return what layer number `layer` makes of the batch: `[windows, tokens, hidden]`."""
        args, kwargs = batch.arguments[layer]
        output = self.layers[layer](batch.hidden, *args, **kwargs)
        self._as_tuple = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model makes of `hidden` behind its last layer, at all tokens or some: logits."""
        output = (hidden,) if self._as_tuple else hidden
        with self._standing_in(lambda *_args, **_kwargs: output):
            device = self._model.device
            mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
            return self._model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits

    @contextmanager
    def _standing_in(self, output: Callable[..., Any]) -> Iterator[None]:
        """Let no layer run in the block: each returns what `output` makes of what it is called with."""
        try:
            for place, layer in enumerate(self.layers):
                self._container[place] = _StandIn(layer, output)
            yield
        finally:
            for place, layer in enumerate(self.layers):
                self._container[place] = layer

    def _embed(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with stopped_before(self.layers[0]) as stop:
            self._forward(input_ids, mask)
        return stop.inputs

    def _arguments(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[tuple, dict[str, Any]]]:
        calls: list[tuple[tuple, dict[str, Any]]] = []
        shapes: list[torch.Size] = []

        def record(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append((args[1:], kwargs))
            shapes.append(hidden.shape)
            # What a layer makes of it changes nothing in how the next one is called.
            return (hidden,) if self._as_tuple else hidden

        with self._standing_in(record):
            self._forward(input_ids, mask)
        if len(set(shapes)) > 1 and not self._as_tuple:
            # The model took the first window for the first of what the layer returns.
            self._as_tuple = True
            return self._arguments(input_ids, mask)
        return calls

    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        device = self._model.device
        self._model.base_model(
            input_ids=input_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            use_cache=False,
        )
