"""An estimate of the time of a run, from the times of one decoder layer and of one small fit on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import Cache, PreTrainedModel

from ..allocation.job import Job
from ..architectures import Site, SiteKey
from ..data.amount import with_number
from ..data.calibration import Calibration
from ..forward.layerwise import LayerRunner
from ..loading.offloading import is_offloaded
from ..loading.subject import Subject
from ..reconstruction.least_squares import NormalEquations, refit
from ..reconstruction.reconstruct import target_of
from ..request.choices import ReconstructionKind, ReconstructionOrder, ReconstructionTarget, Scope
from ..request.config import PruningConfig
from ..request.parts import requests_for_scores
from ..request.registry import get_method
from ..runs import ranks
from ..runs.clock import median_seconds
from ..runs.devices import compute_device
from ..runs.products import products_in_float32
from ..runs.progress import announce, is_silent
from .settling import kept_by_equal_scores


# Passes of all calibration windows through all layers that sequential least squares takes, by its target (see
# `reconstruction/sequential.py`), and those that it takes in addition to refit the linears before the projections.
PASSES = {ReconstructionTarget.DENSE: 4, ReconstructionTarget.LAYER: 3}
PASSES_FOR_SOURCES = 3

# A fit is timed with at most this many features; its products grow with the square of their number, and its solution
# with the cube.
TIMED_FEATURES = 512

# How often each is timed.
REPEATS = 2

# Multiply-adds of one pass over the calibration tokens. With fewer of them a run takes seconds, and its time is not
# estimated.
FEWEST_PRODUCTS = 10**10


def estimated_seconds(
    subject: Subject,
    config: PruningConfig,
    kept: Mapping[SiteKey, Sequence[int]],
    calibration: Calibration | None,
    device: torch.device,
    processes: int,
) -> dict[str, float] | None:
    """Return estimated seconds of the longest stages of a run, `"score"` and `"reconstruct"`; `None` where they
    depend on more than the request and the sizes of the model, or its layers cannot be timed apart from it.

    Several processes share the windows, and each solves all fits. Loading, saving and the checks of the result are not
    included.

    Args:
        subject (`Subject`): the dense model, which may be on the meta device, with all its sites.
        config (`PruningConfig`): the settled request, or that of a replay.
        kept (mapping of site key to sequence of `int`): the units that it keeps, or as many of them.
        calibration (`Calibration`, *optional*): the calibration tokens; `None` where none are needed.
        device (`torch.device`): the device that the run would use.
        processes (`int`): number of processes of the run.
    """
    windows = _scored_windows(config, 0 if calibration is None else len(calibration.input_ids))
    # Fits of experts depend on how many tokens their router sends to each.
    if windows is None or (config.prunes_experts and config.reconstruction == ReconstructionKind.LEAST_SQUARES):
        return None
    score = reconstruct = 0.0
    if calibration is not None:
        number, tokens = calibration.input_ids.shape
        try:
            of_window = _seconds_of_a_window(subject.model, tokens, device)
        except (RuntimeError, NotImplementedError):
            # Some models read values of tensors, which those on the meta device lack.
            return None
        # The first pass collects statistics.
        score = of_window * (windows + number) / processes
        if config.reconstruction == ReconstructionKind.LEAST_SQUARES:
            fits = _seconds_of_fits(subject, config, kept, (number / processes, tokens), device)
            reconstruct = of_window * number / processes * _passes(subject, config, kept) + fits
    return {"score": score * config.rounds, "reconstruct": reconstruct * config.rounds}


def announce_time(subject: Subject, job: Job, calibration: Calibration) -> None:
    """Say how long a run is expected to take, if progress is shown and the run does not end within seconds.

    Args:
        subject (`Subject`): the dense model with all its sites.
        job (`Job`): the settled request, with its budget.
        calibration (`Calibration`): the calibration tokens.
    """
    is_long = calibration.input_ids.numel() * subject.model.num_parameters() >= FEWEST_PRODUCTS
    if job.budget is not None and is_long and not is_silent():
        config, processes = with_number(job.config, len(calibration)), ranks.world_size()
        # Only the process that shows progress gets here.
        with ranks.alone():
            kept = kept_by_equal_scores(subject.sites, config, job.budget)
            seconds = estimated_seconds(subject, config, kept, calibration, device_of(subject), processes)
        announce(expected_time(seconds))


def expected_time(seconds: Mapping[str, float] | None) -> str:
    """Return a sentence on the seconds of the stages of a run, as [`estimated_seconds`] returns them."""
    if seconds is None:
        return "How long the run takes cannot be estimated for this request and model."
    stages = ", ".join(f"{_rounded(of_stage)} to {stage}" for stage, of_stage in seconds.items())
    whole = _rounded(sum(seconds.values()))
    return f"The run takes about {whole} on this machine ({stages}), without loading, checks and saving."


def device_of(subject: Subject) -> torch.device:
    """Return the device that layers would run on; the accelerator, if there is one, for a model without weights."""
    if not is_offloaded(subject.model) or not torch.accelerator.is_available():
        return compute_device(subject.layers[0])
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _rounded(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} seconds" if seconds >= 1.5 else "a second"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _scored_windows(config: PruningConfig, number: int) -> float | None:
    """Return the windows that the methods and the search of a request pass through the model; `number` is that of the
    calibration windows, which may be fewer than asked for."""
    requests = [replace(request, n_samples=number or 1) for request in requests_for_scores(config).values()]
    windows = [get_method(request.method).windows(request) for request in requests]
    if None in windows:
        return None
    searched = config.search_windows if config.resolved_scope == Scope.SEARCH else 0
    return sum(number for number in windows if number is not None) + searched


def _passes(subject: Subject, config: PruningConfig, kept: Mapping[SiteKey, Sequence[int]]) -> int:
    """Return the passes of the reconstruction over all windows."""
    if config.reconstruction_order == ReconstructionOrder.INDEPENDENT:
        return 1
    return PASSES[target_of(subject, kept, config)] + PASSES_FOR_SOURCES * config.refit_sources


@torch.no_grad()
def _seconds_of_a_window(model: PreTrainedModel, tokens: int, device: torch.device) -> float:
    """Return the seconds that one window of so many tokens takes in all layers, from the time of one layer."""
    model_class: Any = type(model)
    with torch.device("meta"):
        skeleton = model_class._from_config(copy.deepcopy(model.config)).to(model.dtype).eval()
        window = torch.zeros(1, tokens, dtype=torch.int64)
    runner = _OnMeta(skeleton)
    middle = len(runner.layers) // 2
    # Without a cache, masks would depend on values.
    arguments = runner.arguments(window, use_cache=True)[middle]
    args, kwargs = tree_map(lambda value: _filled(value, device), arguments)
    layer = _with_random_weights(runner.layers[middle], device)
    width = model.config.get_text_config().hidden_size
    hidden = _random((1, tokens, width), device).to(model.dtype)
    with products_in_float32():
        (seconds,) = median_seconds([lambda: layer(hidden, *args, **kwargs)], REPEATS, device)
    return seconds * len(runner.layers)


class _OnMeta(LayerRunner):
    """Finds the arguments of layers on the meta device."""

    device = torch.device("meta")


def _with_random_weights(layer: nn.Module, device: torch.device) -> nn.Module:
    """Return a layer on the meta device as one with weights; zeros would be faster on some devices."""
    layer = copy.deepcopy(layer).to_empty(device=device)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(0.02 * _random(tensor.shape, device))
        else:
            tensor.zero_()
    return layer


def _random(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return random numbers, drawn without changing those that the caller draws."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def _filled(value: Any, device: torch.device) -> Any:
    """Return an argument of a layer on `device`, without caches; masks let every token see all others."""
    if isinstance(value, Cache):
        return None
    if not isinstance(value, torch.Tensor):
        return value
    fill = torch.ones_like if value.dtype == torch.bool else torch.zeros_like
    return fill(value, device=device)


@torch.no_grad()
def _seconds_of_fits(
    subject: Subject,
    config: PruningConfig,
    kept: Mapping[SiteKey, Sequence[int]],
    windows: tuple[float, int],
    device: torch.device,
) -> float:
    """Return the seconds of the least squares of all sites that are refitted, from the times of one small fit.

    `windows` are the number of calibration windows of a process and their length in tokens.
    """
    fitted, (number, tokens) = _fitted_sites(subject, config, kept), windows
    if not fitted:
        return 0.0
    outputs = subject.text_config.hidden_size
    features = [len(kept[site.key]) * site.unit_width for site in fitted]
    timed = min(TIMED_FEATURES, max(features))
    inputs, residual = (_random((tokens, width), device) for width in (timed, outputs))
    sums = [NormalEquations.empty(timed, outputs, device) for _ in range(2)]

    def add() -> None:
        for equations in sums:
            equations.add(inputs, residual)

    def solve() -> None:
        fit, held_out = (equations.pooled() for equations in sums)
        refit(fit, held_out, config.ridge)

    added, solved = median_seconds([add, solve], REPEATS, device)
    sizes = [width / timed for width in features]
    return sum(added / len(sums) * number * size**1.5 + solved * size**2.5 for size in sizes)


def _fitted_sites(subject: Subject, config: PruningConfig, kept: Mapping[SiteKey, Sequence[int]]) -> list[Site]:
    """Return the sites whose projections are refitted: with the dense model as the target also those after a loss."""
    sites = subject.sites
    losing = [site for site in sites if len(kept[site.key]) < site.num_units]
    towards_dense = (
        config.reconstruction_order != ReconstructionOrder.INDEPENDENT
        and target_of(subject, kept, config) == ReconstructionTarget.DENSE
        and not config.prunes_experts
    )
    if towards_dense and losing:
        losing = list(sites[sites.index(losing[0]) :])
    return [site for site in losing if kept[site.key] and site.routing is None]
