"""Measuring the latencies of layers on this machine, by their widths."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..allocation.constraints import levels_of
from ..architectures import Site
from ..cutting.surgery import pruned_config
from ..data.calibration import Calibration
from ..files import check_output_file
from ..forward.layerwise import Batch, LayerRunner
from ..loading.offloading import is_offloaded
from ..loading.state import evaluating
from ..loading.subject import Subject
from ..models.resizing import resize_layer
from ..request.config import PruningConfig
from ..runs import ranks
from ..runs.clock import median_seconds
from ..runs.loggers import get_logger
from ..runs.progress import progress
from .latency import LatencyTable, at_measured_widths, shape_of


logger = get_logger(__name__)

# How often every width is timed; the widths take turns.
REPEATS = 7


# Tensors start at multiples of this number of elements.
ALIGNMENT = 64


# The largest ratio between the sum of the layers' latencies and that of the whole model that causes no warning.
AGREEMENT = 1.25


def load_or_measure(subject: Subject, config: PruningConfig, known: LatencyTable | None = None) -> LatencyTable:
    """Return the table in the file `config.latency_table` if it exists; otherwise measure one and write it there.

    If there are several processes, the main one measures while the others wait.

    One layer of every shape of site is timed with all widths that the request allows at the table's resolution. The
    weights of all widths are views of one buffer of random numbers, so that the memory of two layers is sufficient.

    Args:
        subject (`Subject`): the dense model, which is not changed, with all its sites.
        config (`PruningConfig`): `latency_tokens` and `latency_table`.
        known (`LatencyTable`, *optional*): a table that was measured before, which is used if it fits.

    Raises:
        ValueError: where the file belongs to another machine or model, the prompt is too long for the model, or parts
            of the model are offloaded.
    """
    if is_offloaded(subject.model):
        raise ValueError(
            "target_speedup times layers on the device that runs them, and parts of this model are offloaded. Load it "
            "without device_map on a device that holds all of it, or use target_bytes."
        )
    return LatencyTable.from_dict(ranks.from_main(lambda: vars(_load_or_measure(subject, config, known))))


def _load_or_measure(subject: Subject, config: PruningConfig, known: LatencyTable | None) -> LatencyTable:
    model, sites = subject.model, subject.sites
    widest: dict[str, Site] = {}
    for site in sites:
        shape = shape_of(site)
        if shape not in widest or site.num_units > widest[shape].num_units:
            widest[shape] = site
    config = at_measured_widths(sites, replace(config, min_units_per_site=1))
    measured_on = _circumstances(model, widest, config)
    path = None if config.latency_table is None else check_output_file(config.latency_table)
    if path is not None and path.exists():
        return LatencyTable.load(path, measured_on)
    table = known
    if table is None or table.measured_on != measured_on:
        table = _measure(subject, widest, config, measured_on)
    if path is not None:
        table.save(path)
    return table


@torch.no_grad()
def _measure(
    subject: Subject,
    widest: dict[str, Site],
    config: PruningConfig,
    measured_on: dict[str, Any],
) -> LatencyTable:
    model = subject.model
    with evaluating(model):
        batch, embedded = _prompt(model, config.latency_tokens)
        layer_seconds = {}
        for shape, site in progress(widest.items(), "Timing widths", unit="shape"):
            equal_scores = torch.zeros(site.num_units, dtype=torch.float32)
            kept = [*reversed(levels_of(site, equal_scores, config)), list(range(site.num_units))]
            layers = _variants(subject, site, kept)
            runs = [_run_of(layer, site.layer, batch, embedded) for layer in layers]
            seconds = median_seconds(runs, REPEATS, site.projection.weight.device)
            layer_seconds[shape] = [(len(units), taken) for units, taken in zip(kept, seconds)]
        table = LatencyTable(prefill_seconds(model, config.latency_tokens), layer_seconds, measured_on)
    warn_of_disagreement(table, subject.sites)
    return table


def warn_of_disagreement(table: LatencyTable, sites: Sequence[Site]) -> None:
    """Warn where the latencies of a table's layers do not add up to that of the whole model."""
    for kind in sorted({site.kind for site in sites}):
        layers = sum(table.seconds(site) for site in sites if site.kind == kind)
        if not 1 / AGREEMENT < layers / table.model_seconds < AGREEMENT:
            logger.warning(
                "The layers' latencies add up to %.3g s and the whole model's is %.3g s: the machine was busy, or the "
                "layers are too small to be timed one by one. Speed-ups may differ from the prediction. Measure again "
                "when the machine is idle, after deleting the latency_table if there is one.",
                layers,
                table.model_seconds,
            )
            return


@torch.no_grad()
def prefill_seconds(model: PreTrainedModel, tokens: int) -> float:
    """Return the median seconds of a forward pass over a prompt of `tokens` tokens, without computing logits."""
    prompt = _prompt_ids(model, tokens).to(model.device)
    with evaluating(model):
        run = lambda: model.base_model(input_ids=prompt, use_cache=False)  # noqa: E731
        return median_seconds([run], REPEATS, model.device)[0]


def _circumstances(model: PreTrainedModel, widest: dict[str, Site], config: PruningConfig) -> dict[str, Any]:
    on_cpu = model.device.type == "cpu"
    return {
        "device": _name_of(model.device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "torch": torch.__version__,
        "dtype": str(model.dtype),
        "attention": model.config.get_text_config()._attn_implementation,
        "tokens": config.latency_tokens,
        "multiple_of": config.multiple_of,
        "shapes": {shape: site.num_units for shape, site in widest.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _prompt_ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"latency_tokens={tokens} is more than the {longest} positions of the model.")
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


def _prompt(model: PreTrainedModel, tokens: int) -> tuple[Batch, torch.Tensor]:
    runner = LayerRunner(model)
    (batch,) = runner.batches(Calibration(_prompt_ids(model, tokens)), 1)
    return batch, runner.embed(batch)


def _run_of(layer: nn.Module, index: int, batch: Batch, embedded: torch.Tensor) -> Callable[[], Any]:
    args, kwargs = batch.arguments[index]
    return lambda: layer(embedded, *args, **kwargs)


def _variants(subject: Subject, site: Site, kept: list[list[int]]) -> list[nn.Module]:
    """Return copies of the site's layer that keep the units of each list, with all weights in the same memory."""
    model, architecture = subject.model, subject.architecture
    original = architecture.layers(model)[site.layer][1]
    weight = site.projection.weight
    size = sum(_aligned(parameter.numel()) for parameter in original.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)
    buffer = torch.randn(size, generator=generator, dtype=torch.float32, device=weight.device)
    buffer = buffer.mul_(0.02).to(weight.dtype)
    skeleton = copy.deepcopy(original).to("meta")
    everything = {other.key: list(range(other.num_units)) for other in subject.sites}
    layers = []
    for units in kept:
        config: Any = pruned_config(subject, everything | {site.key: units}, set())
        layer = copy.deepcopy(skeleton)
        resize_layer(layer, architecture.layout, config.per_layer_config[site.layer])
        # Within a layer the weights do not overlap: overlapping ones would be read from a cache.
        start = 0
        for name, parameter in list(layer.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            values = buffer[start : start + parameter.numel()].view(parameter.shape)
            setattr(layer.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
            start += _aligned(parameter.numel())
        for name, _ in list(layer.named_buffers()):
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, original.get_buffer(name))
        layers.append(layer.eval())
    return layers


def _aligned(count: int) -> int:
    """Return the smallest multiple of `ALIGNMENT` that is at least `count`."""
    return -(-count // ALIGNMENT) * ALIGNMENT
