"""Running calibration windows through a model layer by layer, so that layers may change in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import get_architecture
from ..data.calibration import Calibration, Windows
from ..loading.offloading import input_device, inputs_of_model
from ..runs.devices import compute_device
from .hooks import stopped_before
from .losses import plain_outputs


# The arguments of every layer except for hidden states, by the shape of a batch.
Arguments = dict[tuple[int, ...], list[tuple[tuple, dict[str, Any]]]]


@dataclass
class Batch:
    """A batch of windows, with the arguments of every layer.

    Args:
        input_ids (`Tensor[windows, tokens]`, int64): the tokens.
        attention_mask (`Tensor[windows, tokens]`, *optional*): 0 where a token is padding.
        arguments (`list[tuple[tuple, dict]]`): the arguments of every layer except for hidden states.
        inputs (`dict[str, Tensor]`): other inputs of the model, such as pixel values.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    arguments: list[tuple[tuple, dict[str, Any]]]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Return `[windows, tokens, features]`, or values that are flat already, as `[tokens, features]` without
        padding."""
        values = values.flatten(0, -2)
        return (
            values if self.attention_mask is None else values[self.attention_mask.bool().flatten().to(values.device)]
        )


class _TakesTuples(Exception):
    """The model expects tuples from its layers, and not hidden states alone."""


class _StandIn(nn.Module):
    """Replaces a decoder layer that does not run. Its attributes are those of the layer.

    Args:
        layer (`nn.Module`): the layer.
        output (`Callable`): is called with the arguments of the layer, and returns the output.
    """

    def __init__(self, layer: nn.Module, output: Callable[..., Any]):
        super().__init__()
        # Attributes of a module would make the layer a submodule.
        self.__dict__.update(_layer=layer, _output=output)

    def forward(self, *args, **kwargs):
        return self._output(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of `model`, first to last."""
    return [layer for _, layer in get_architecture(model.config).layers(model)]


class LayerRunner:
    """Runs single decoder layers of `model` with the arguments that the whole model would call them with."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.layers = decoder_layers(model)
        first, _ = get_architecture(model.config).layers(model)[0]
        self._container: Any = model.get_submodule(first.rpartition(".")[0])
        self._as_tuple = False

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return input_device(self.model)

    def device_of(self, layer: int) -> torch.device:
        """Return the device on which layer number `layer` runs."""
        return compute_device(self.layers[layer])

    @torch.no_grad()
    def batches(self, calibration: Calibration, batch_size: int) -> list[Batch]:
        """Return the windows as batches, with the arguments of every layer."""
        arguments: Arguments = {}
        places = torch.arange(len(calibration.input_ids)).split(batch_size)
        return [self.batch(calibration.windows(windows), arguments) for windows in places]

    @torch.no_grad()
    def batch(self, windows: Windows, known: Arguments) -> Batch:
        """Return windows as a batch, with the arguments of every layer.

        Args:
            windows (`Windows`): the inputs of the model.
            known (`dict`): arguments of batches by their shape, to which those of this batch are added.
        """
        # All batches of a shape have the same arguments, unless they have padding or images.
        input_ids, mask, inputs = windows
        shape = tuple(input_ids.shape)
        if mask is not None or inputs:
            inputs = inputs_of_model(self.model, inputs)
            return Batch(input_ids, mask, self.arguments(input_ids, mask, **inputs), inputs)
        if shape not in known:
            known[shape] = self.arguments(input_ids, None)
        return Batch(input_ids, None, known[shape])

    @torch.no_grad()
    def embed(self, batch: Batch) -> torch.Tensor:
        """Return the inputs of the first layer: `[windows, tokens, hidden]`."""
        with stopped_before(self.layers[0]) as stop:
            self._forward(batch.input_ids, batch.attention_mask, **batch.inputs)
        return stop.inputs

    def run(self, layer: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of layer number `layer` for the batch's hidden states: `[windows, tokens, hidden]`."""
        args, kwargs = batch.arguments[layer]
        # Hidden states are stored in the memory of the host.
        hidden = hidden.to(self.device_of(layer), non_blocking=True)
        output = self.layers[layer](hidden, *args, **kwargs)
        self._as_tuple = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of the model for `hidden`, the output of its last layer at all or some tokens: logits, or
        hidden states of a model without a head."""
        # Hidden states are stored in the memory of the host.
        hidden = hidden.to(self.device_of(len(self.layers) - 1), non_blocking=True)
        output = (hidden,) if self._as_tuple else hidden
        # As many tokens as there are hidden states, since some models give these the shape of the tokens.
        input_ids, mask = (
            None if values is None else values[:, : hidden.shape[1]].to(self.device)
            for values in (batch.input_ids, batch.attention_mask)
        )
        with self._standing_in(lambda *_args, **_kwargs: output):
            return self.model(input_ids=input_ids, attention_mask=mask, **plain_outputs(self.model))[0]

    @contextmanager
    def _standing_in(self, output: Callable[..., Any]) -> Iterator[None]:
        """Within the context, replace every layer by a call of `output` with the arguments of the layer."""
        try:
            for place, layer in enumerate(self.layers):
                self._container[place] = _StandIn(layer, output)
            yield
        finally:
            for place, layer in enumerate(self.layers):
                self._container[place] = layer

    @torch.no_grad()
    def arguments(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None = None, **inputs
    ) -> list[tuple[tuple, dict[str, Any]]]:
        """Return the arguments of every layer except for hidden states, if the model is called with `input_ids`, a
        mask and the other `inputs`, such as a KV cache."""
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def record(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if hidden.dim() < 3 and not self._as_tuple:
                # The model took the first window, since it expects a tuple from the layer before.
                raise _TakesTuples
            calls.append((args[1:], kwargs))
            # The arguments of the next layer do not depend on the output of this one.
            return (hidden,) if self._as_tuple else hidden

        try:
            with self._standing_in(record):
                self._forward(input_ids, mask, **inputs)
        except _TakesTuples:
            self._as_tuple = True
            return self.arguments(input_ids, mask, **inputs)
        return calls

    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor | None, **inputs) -> None:
        device = self.device
        self.model.base_model(
            input_ids=input_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            **{**plain_outputs(self.model), **inputs},
        )
