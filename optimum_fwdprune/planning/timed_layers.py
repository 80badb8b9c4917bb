"""Decoder layers of several widths as functions that a clock can time: on a whole prompt, or on one new token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Site
from ..cutting.surgery import pruned_config
from ..data.calibration import Calibration
from ..forward.layerwise import LayerRunner
from ..forward.losses import PLAIN_OUTPUTS
from ..loading.subject import Subject
from ..models.resizing import resize_layer
from ..models.skipped import SkippedAttention
from ..request.choices import Phase, UnitKind


# Tensors start at multiples of this number of elements.
ALIGNMENT = 64

# In a decoding step, copies of a layer run one after the other that have together at least this many bytes, or as many
# copies as the model has layers. The weights of one layer would be read from a cache of the processor.
UNCACHED_BYTES = 512 * 2**20


@dataclass(frozen=True)
class TimedRun:
    """A function to time.

    Args:
        module (`nn.Module`): the module that it runs, or a module of the same size.
        times (`int`): how many such modules a call runs, one after the other.
        call (`Callable`): the function.
    """

    module: nn.Module
    times: int
    call: Callable[[], Any]

    def __call__(self) -> Any:
        return self.call()


@dataclass(frozen=True)
class Calls:
    """The arguments with which a model calls its decoder layers in a phase of a generation.

    Args:
        hidden (`Tensor[1, tokens, hidden]`): hidden states before a layer.
        arguments (`list[tuple[tuple, dict]]`): the other arguments, layer by layer.
        cache (`Cache`, *optional*): the KV cache among the arguments, which holds the tokens before.
    """

    hidden: torch.Tensor
    arguments: list[tuple[tuple, dict[str, Any]]]
    cache: Any = None
    _stored: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, phase: str, input_ids: torch.Tensor) -> Calls:
        """Return the calls of a model for a pass over the tokens `input_ids`, int64 `[1, tokens]`, or, with the phase
        `"decode"`, over one token after them."""
        runner, inputs, cache = LayerRunner(model), {}, None
        if phase == Phase.DECODE:
            cache, input_ids = filled_cache(model, input_ids), input_ids[:, -1:]
            inputs = {"use_cache": True, "past_key_values": cache}
        (batch,) = runner.batches(Calibration(input_ids), 1)
        return cls(runner.embed(batch), runner.arguments(input_ids, None, **inputs), cache)

    def run_of(self, layer: nn.Module, index: int, number: int) -> Callable[[], Any]:
        """Return a function that runs a layer in the place of layer number `index`.

        Args:
            layer (`nn.Module`): a layer of any width.
            index (`int`): index of the layer whose arguments it gets.
            number (`int`): number of the copy of the layer. Copies have caches of their own.
        """
        args, kwargs = self.arguments[index]
        if self.cache is None:
            return lambda: layer(self.hidden, *args, **kwargs)
        # A pruned model stores nothing for a layer without attention.
        has_attention = not any(isinstance(module, SkippedAttention) for module in layer.modules())
        cache = copy.copy(self.cache) if has_attention else None
        args = tuple(cache if value is self.cache else value for value in args)
        kwargs = {name: cache if value is self.cache else value for name, value in kwargs.items()}
        if cache is None:
            return lambda: layer(self.hidden, *args, **kwargs)
        cache.layers = list(cache.layers)
        narrowed = cache.layers[index] = _Narrowed(self.cache.layers[index], (index, number), self._stored)
        layer(self.hidden, *args, **kwargs)

        def run() -> Any:
            # The same tokens are in the cache before every run.
            cache.layers[index] = copy.copy(narrowed.stored)
            return layer(self.hidden, *args, **kwargs)

        return run


class _Narrowed:
    """Stands in for the cache of a layer, to find out how many KV heads a narrower layer stores.

    Args:
        filled (`CacheLayerMixin`): the cache of the layer at its full width.
        copied (`tuple[int, int]`): index of the layer, and number of its copy.
        stored (`dict`): narrower caches by layer, copy and number of KV heads, which is added to. The caches of layers
            differ in their length where some have a window.
    """

    def __init__(self, filled: Any, copied: tuple[int, int], stored: dict[tuple[int, int, int], Any]):
        self.stored = filled
        self._copied, self._every = copied, stored

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> Any:
        heads = keys.shape[1]
        place = (*self._copied, heads)
        if place not in self._every:
            narrowed = copy.copy(self.stored)
            narrowed.keys, narrowed.values = self.stored.keys[:, :heads].clone(), self.stored.values[:, :heads].clone()
            self._every[place] = narrowed
        self.stored = self._every[place]
        return copy.copy(self.stored).update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)


@torch.no_grad()
def filled_cache(model: PreTrainedModel, input_ids: torch.Tensor) -> Any:
    """Return the KV cache of a model after it has read the tokens `input_ids`, int64 `[1, tokens]`."""
    inputs = {**PLAIN_OUTPUTS, "use_cache": True}
    return model.base_model(input_ids=input_ids.to(model.device), **inputs).past_key_values


def timed_runs(subject: Subject, site: Site, kept: Sequence[list[int]], calls: Calls) -> list[TimedRun]:
    """Return runs of the layer of a site with the units of each list in `kept`, of which an empty list removes the
    sublayer, and as the last one the run of the layer without attention and MLP.

    On a prompt, a run is one of the layer; on a single token, it is one of several copies of the layer.
    """
    copies = LayerCopies(subject, site, 1 if calls.cache is None else _copies_of(subject, site, calls.cache))
    variants = [copies.of(units, set() if units else {site.kind}) for units in kept]
    variants.append(copies.of(range(site.num_units), set(UnitKind)))
    return [_run_of(layers, site, calls) for layers in variants]


def _run_of(layers: Sequence[nn.Module], site: Site, calls: Calls) -> TimedRun:
    runs = [calls.run_of(layer, site.layer, number) for number, layer in enumerate(layers)]
    return TimedRun(layers[0], len(runs), lambda: [run() for run in runs][-1])


def _copies_of(subject: Subject, site: Site, cache: Any) -> int:
    """Return the number of copies of a layer that a decoding step is timed on."""
    layer, filled = subject.layers[site.layer], cache.layers[site.layer]
    size = sum(parameter.nbytes for parameter in layer.parameters())
    # Nothing is stored for a layer without attention.
    size += 0 if filled.keys is None else filled.keys.nbytes + filled.values.nbytes
    return min(len(subject.layers), -(-UNCACHED_BYTES // size))


class LayerCopies:
    """Copies of the layer of a site at any width, whose weights are random numbers in one buffer for all widths, so
    that the memory of one layer per copy is sufficient.

    Args:
        subject (`Subject`): the model, which is not changed.
        site (`Site`): the site.
        count (`int`): number of copies.
    """

    def __init__(self, subject: Subject, site: Site, count: int):
        self._subject, self._site, self._count = subject, site, count
        self._layer, weight = subject.layers[site.layer], site.projection.weight
        self._size = sum(_aligned(parameter.numel()) for parameter in self._layer.parameters())
        generator = torch.Generator(weight.device).manual_seed(0)
        numbers = torch.randn(count * self._size, generator=generator, dtype=torch.float32, device=weight.device)
        self._buffer = numbers.mul_(0.02).to(weight.dtype)

    def of(self, units: Sequence[int], skipped: set[str]) -> list[nn.Module]:
        """Return layers that keep the units `units` of the site and lack the sublayers `skipped`."""
        architecture, site = self._subject.architecture, self._site
        kept = {other.key: list(range(other.num_units)) for other in self._subject.sites}
        config: Any = pruned_config(self._subject, kept | ({site.key: list(units)} if units else {}), set())
        of_layer = copy.copy(config.per_layer_config[site.layer])
        of_layer.skip = sorted({*of_layer.skip, *skipped})
        narrowed = copy.deepcopy(self._layer).to("meta")
        resize_layer(narrowed, architecture.layout, of_layer)
        return [self._filled(copy.deepcopy(narrowed), number * self._size) for number in range(self._count)]

    def _filled(self, layer: nn.Module, start: int) -> nn.Module:
        """Set the parameters of a layer to numbers of the buffer from `start`, and its buffers to those of the model.

        Parameters do not overlap, since overlapping ones would be read from a cache.
        """
        for name, parameter in list(layer.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            values = self._buffer[start : start + parameter.numel()].view(parameter.shape)
            setattr(layer.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
            start += _aligned(parameter.numel())
        for name, _ in list(layer.named_buffers()):
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, self._layer.get_buffer(name))
        return layer.eval()


def _aligned(count: int) -> int:
    """Return the smallest multiple of `ALIGNMENT` that is at least `count`."""
    return -(-count // ALIGNMENT) * ALIGNMENT
