"""Calibration windows carried through a model one decoder layer at a time, so that a layer may change under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..architectures import Site, SiteKey, get_architecture
from ..data.calibration import Calibration
from ..loading.offloading import input_device, is_offloaded, resident
from ..runs.devices import compute_device
from ..runs.progress import progress
from ..runs.resume import Checkpoint, State
from ..runs.shelves import Shelf
from .losses import PLAIN_OUTPUTS
from .statistics import Observer, SiteStatistics, collect_statistics


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


@dataclass
class Batch:
    """Some windows on their way through the model.

    Args:
        input_ids (`Tensor[windows, tokens]`, int64): the tokens.
        attention_mask (`Tensor[windows, tokens]`, *optional*): 0 where a token is padding.
        arguments (`list[tuple[tuple, dict]]`): what every layer is called with besides hidden states.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    arguments: list[tuple[tuple, dict[str, Any]]]

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Flatten `[windows, tokens, features]`, or what is flat already, to `[tokens, features]` without padding."""
        values = values.flatten(0, -2)
        return (
            values if self.attention_mask is None else values[self.attention_mask.bool().flatten().to(values.device)]
        )


class _TakesTuples(Exception):
    """The model takes more from its layers than hidden states."""


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


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of `model`, first to last."""
    return [layer for _, layer in get_architecture(model.config).layers(model)]


class LayerRunner:
    """Runs decoder layers of `model` by themselves, called with what the whole model would call them with."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self.layers = decoder_layers(model)
        first, _ = get_architecture(model.config).layers(model)[0]
        self._container: Any = model.get_submodule(first.rpartition(".")[0])
        self._as_tuple = False

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return input_device(self._model)

    def device_of(self, layer: int) -> torch.device:
        """Where layer number `layer` computes."""
        return compute_device(self.layers[layer])

    @torch.no_grad()
    def batches(self, calibration: Calibration, batch_size: int) -> list[Batch]:
        """Return the windows, ready for any layer."""
        found = []
        arguments: dict[tuple[int, ...], list] = {}
        for windows in torch.arange(len(calibration.input_ids)).split(batch_size):
            input_ids, mask = calibration.windows(windows)
            # Unpadded batches of one size are called alike; padding is what makes them differ.
            shape = tuple(input_ids.shape)
            if mask is not None or shape not in arguments:
                arguments[shape] = self._arguments(input_ids, mask)
            found.append(Batch(input_ids, mask, arguments[shape]))
        return found

    @torch.no_grad()
    def embed(self, batch: Batch) -> torch.Tensor:
        """Return what goes into the first layer: `[windows, tokens, hidden]`."""
        with stopped_before(self.layers[0]) as stop:
            self._forward(batch.input_ids, batch.attention_mask)
        return stop.inputs

    def run(self, layer: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Return what layer number `layer` makes of the batch's hidden states: `[windows, tokens, hidden]`."""
        args, kwargs = batch.arguments[layer]
        # Hidden states wait in the memory of the host.
        hidden = hidden.to(self.device_of(layer), non_blocking=True)
        output = self.layers[layer](hidden, *args, **kwargs)
        self._as_tuple = isinstance(output, tuple)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the model makes of `hidden` behind its last layer, at all tokens or some: logits."""
        output = (hidden,) if self._as_tuple else hidden
        with self._standing_in(lambda *_args, **_kwargs: output):
            device = self.device
            mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
            return self._model(input_ids=batch.input_ids.to(device), attention_mask=mask, **PLAIN_OUTPUTS).logits

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

    def _arguments(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[tuple, dict[str, Any]]]:
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def record(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if hidden.dim() < 3 and not self._as_tuple:
                # The model took the first window for the first of what the layer returns.
                raise _TakesTuples
            calls.append((args[1:], kwargs))
            # What a layer makes of it changes nothing in how the next one is called.
            return (hidden,) if self._as_tuple else hidden

        try:
            with self._standing_in(record):
                self._forward(input_ids, mask)
        except _TakesTuples:
            self._as_tuple = True
            return self._arguments(input_ids, mask)
        return calls

    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        device = self.device
        self._model.base_model(
            input_ids=input_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            **PLAIN_OUTPUTS,
        )


@torch.no_grad()
def statistics_by_layer(
    model: PreTrainedModel,
    sites: Iterable[Site],
    texts: Sequence[Calibration],
    batch_size: int,
    kinds: Iterable[str],
    shelf: Shelf | None = None,
) -> Iterator[tuple[list[Site], list[dict[SiteKey, SiteStatistics]]]]:
    """Yield the sites of every layer with their statistics on each of the texts, in one pass over the tokens.

    With several processes each runs a share of the windows, and all yield the statistics of all of them. The
    statistics of one layer are held at a time, and the hidden states of all tokens wait in the memory of the host. The
    layer's parameters are in memory while its sites are out.

    Args:
        model (`PreTrainedModel`): the dense model; its layers may be offloaded.
        sites (iterable of `Site`): where to look, layer by layer.
        texts (sequence of `Calibration`): the tokens.
        batch_size (`int`): windows per forward pass.
        kinds (iterable of `str`): what to gather, of `KINDS_OF_STATISTICS`.
        shelf (`Shelf`, *optional*): where hidden states wait; it settles after every layer, and a pass that was
            interrupted goes on behind the last layer that it settled.
    """
    runner, shelf, kinds = LayerRunner(model), shelf or Shelf(), list(kinds)
    shares = [text.own_share() for text in texts]
    batches = [[] if share is None else runner.batches(share, batch_size) for share in shares]
    places = [(text, number) for text, found in enumerate(batches) for number in range(len(found))]
    first = shelf.settled
    if first == 0:
        for text, number in places:
            shelf[f"0.{text}.{number}"] = runner.embed(batches[text][number])
        shelf.settle(0)
    by_layer = {layer: list(group) for layer, group in groupby(sites, key=lambda site: site.layer)}
    for layer in range(first, len(runner.layers)):
        of_layer = by_layer.get(layer, [])
        observers = [Observer(of_layer, kinds) for _ in texts]
        with resident(runner.layers[layer]):
            # Nothing is to be seen behind the last site.
            for text, number in places if layer <= max(by_layer, default=-1) else ():
                batch = batches[text][number]
                observers[text].attention_mask = batch.attention_mask
                with observers[text].watching():
                    hidden = runner.run(layer, batch, shelf.pop(f"{layer}.{text}.{number}"))
                shelf[f"{layer + 1}.{text}.{number}"] = hidden
            for observer in observers:
                observer.pool()
            yield of_layer, [observer.statistics() for observer in observers]
        shelf.settle(layer + 1)


def gather_statistics(
    model: PreTrainedModel,
    sites: Iterable[Site],
    texts: Sequence[Calibration],
    batch_size: int,
    kinds: Iterable[str],
    checkpoint: Checkpoint | None = None,
) -> list[dict[SiteKey, SiteStatistics]]:
    """Return the statistics of every site on each of the texts, as `collect_statistics` does, reading layers that are
    offloaded once and not once per batch."""
    sites = list(sites)
    if not is_offloaded(model.base_model):
        return [collect_statistics(model, sites, text, batch_size, kinds, checkpoint) for text in texts]
    checkpoint = checkpoint or Checkpoint()
    name, about = "statistics-by-layer", {"texts": [text.fingerprint for text in texts], "kinds": sorted(kinds)}
    shelf = Shelf(checkpoint.folder(f"{name}-hidden-states", about=about))
    stage = checkpoint.stage(name, about=about)
    found = stage.load(_unpacked) or [{} for _ in texts]
    layers = statistics_by_layer(model, sites, texts, batch_size, kinds, shelf)
    total = len(decoder_layers(model))
    for _, of_layer in progress(layers, "Calibrating", total=total, unit="layer", initial=shelf.settled):
        for all_layers, statistics in zip(found, of_layer):
            all_layers |= statistics
        # Before hidden states move on: what lies behind them must be known.
        stage.save(lambda: _packed(found))
    shelf.clear()
    return found


def _packed(found: list[dict[SiteKey, SiteStatistics]]) -> State:
    tensors: dict[str, torch.Tensor] = {}
    counts = []
    for text, statistics in enumerate(found):
        counts.append(next((each.count for each in statistics.values()), 0))
        for (layer, kind), each in statistics.items():
            site = f"{text}.{layer}.{kind}"
            tensors |= {f"{site}.mean": each.mean, f"{site}.variance": each.variance}
            tensors |= {f"{site}.norm.{name}": norm for name, norm in each.source_norms.items()}
    return tensors, {"counts": counts}


def _unpacked(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> list[dict[SiteKey, SiteStatistics]]:
    found: list[dict[SiteKey, SiteStatistics]] = [{} for _ in numbers["counts"]]
    for name in tensors:
        text, layer, kind, what = name.split(".", maxsplit=3)
        if what == "mean":
            site = name.removesuffix("mean")
            norms = {
                each.removeprefix(f"{site}norm."): norm
                for each, norm in tensors.items()
                if each.startswith(f"{site}norm.")
            }
            statistics = SiteStatistics(
                numbers["counts"][int(text)], tensors[name], tensors[f"{site}variance"], source_norms=norms
            )
            found[int(text)][(int(layer), kind)] = statistics
    return found
