"""Measuring the latencies of layers on this machine, by their widths."""

from __future__ import annotations

import copy
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ..allocation.constraints import levels_of
from ..architectures import Site
from ..architectures.positions import positions_of
from ..files import check_output_file
from ..loading.offloading import is_offloaded
from ..loading.state import evaluating
from ..loading.subject import Subject
from ..request.choices import Phase
from ..request.config import PruningConfig
from ..request.speed import shares_of_phases
from ..runs import ranks
from ..runs.clock import median_seconds
from ..runs.loggers import get_logger
from ..runs.products import products_as_served, warn_of_slow_products
from ..runs.progress import progress
from .latency import HERE, Latencies, LatencyTable, at_measured_widths, shape_of
from .timed_layers import Calls, TimedRun, filled_cache, timed_runs


logger = get_logger(__name__)

# How often every width is timed; the widths take turns.
REPEATS = 7

# The largest ratio between the sum of the layers' latencies and that of the whole model that causes no warning.
AGREEMENT = 1.25


def load_or_measure(subject: Subject, config: PruningConfig, known: LatencyTable | None = None) -> LatencyTable:
    """Return the table in the file `config.latency_table` if it exists; otherwise measure one and write it there.

    A phase that the table lacks is measured and added. If there are several processes, the main one measures while the
    others wait.

    One layer of every shape of site is timed with all widths that the request allows at the table's resolution,
    without the sublayer, and without both sublayers. The weights of all widths are views of one buffer of random
    numbers.

    Args:
        subject (`Subject`): the dense model, which is not changed, with all its sites.
        config (`PruningConfig`): `speed_of`, `latency_tokens`, `latency_context` and `latency_table`.
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
    for phase in shares_of_phases(config.speed_of):
        check_length(subject.model, config, phase)
    return LatencyTable.from_dict(ranks.from_main(lambda: _load_or_measure(subject, config, known).to_dict()))


def _load_or_measure(subject: Subject, config: PruningConfig, known: LatencyTable | None) -> LatencyTable:
    widest = widest_sites(subject.sites)
    # The table is also for requests that keep fewer units, and other numbers of heads.
    config = replace(at_measured_widths(subject.sites, config), min_units_per_site=1, tensor_parallel=1, for_gguf=None)
    measured_on = circumstances(subject.model, widest, config)
    path = None if config.latency_table is None else check_output_file(config.latency_table)
    if path is not None and path.exists():
        table = LatencyTable.load(path, measured_on)
    elif known is not None and known.fits(measured_on) is None:
        table = known
    else:
        table = LatencyTable({}, measured_on)
    missing = [phase for phase in shares_of_phases(config.speed_of) if not _holds(table, phase, config, path)]
    if missing:
        warn_of_slow_products(subject.model)
    for phase in missing:
        table = replace(table, phases={**table.phases, phase: _measure(subject, config, phase)})
    if path is not None and (missing or not path.exists()):
        table.save(path)
    return table


def _holds(table: LatencyTable, phase: str, config: PruningConfig, path: Path | None) -> bool:
    """Return whether a table holds the latencies of a phase that the request asks for.

    Raises:
        ValueError: where the file holds them for another number of tokens, or another program must measure them.
    """
    wanted, latencies = config.phase_tokens[phase], table.phases.get(phase)
    if latencies is not None and latencies.tokens == wanted:
        return True
    if path is not None and path.exists() and (latencies is not None or not table.is_of_this_program):
        option = "latency_tokens" if phase == Phase.PREFILL else "latency_context"
        held = "none" if latencies is None else f"those of {option}={latencies.tokens}"
        raise ValueError(
            f"{path} was measured under other conditions: of the latencies of {phase} it holds {held}, and this "
            f"request is for {option}={wanted}. Name another file, or delete it."
        )
    return False


def widest_sites(sites: Sequence[Site], tokens: int | None = None) -> dict[str, Site]:
    """Return the site with the most units of every shape; `tokens` is that of [`shape_of`]."""
    widest: dict[str, Site] = {}
    for site in sites:
        shape = shape_of(site, tokens)
        if shape not in widest or site.num_units > widest[shape].num_units:
            widest[shape] = site
    return widest


@torch.no_grad()
def _measure(subject: Subject, config: PruningConfig, phase: str) -> Latencies:
    model, tokens = subject.model, config.phase_tokens[phase]
    with evaluating(model), products_as_served():
        calls = Calls.of(model, phase, _prompt_ids(model, tokens))
        timed, of_layers = {}, []
        widest = widest_sites(subject.sites, tokens)
        for shape, site in progress(widest.items(), f"Timing widths ({phase})", unit="shape"):
            equal_scores = torch.zeros(site.num_units, dtype=torch.float32)
            kept = [[], *reversed(levels_of(site, equal_scores, config)), list(range(site.num_units))]
            runs = timed_runs(subject, site, kept, calls)
            measured = median_seconds(runs, REPEATS, site.projection.weight.device)
            *seconds, of_layer = (taken / run.times for run, taken in zip(runs, measured))
            of_layers.append(of_layer)
            timed[shape] = [(len(units), taken - seconds[0]) for units, taken in zip(kept, seconds)]
        # The table of another phase may have more tokens, so that all tables have the same entries.
        site_seconds = {shape_of(site): timed[shape_of(site, tokens)] for site in subject.sites}
        latencies = Latencies(tokens, phase_seconds(model, config, phase), statistics.median(of_layers), site_seconds)
        without_head: Any = model.base_model
        warn_of_disagreement(latencies, subject.sites, phase_seconds(without_head, config, phase))
    return latencies


def warn_of_disagreement(latencies: Latencies, sites: Sequence[Site], whole: float) -> None:
    """Warn where the latencies of the layers do not add up to `whole`, the seconds of the model without its head."""
    layers = sum(map(latencies.seconds, sites)) + len({site.layer for site in sites}) * latencies.layer_seconds
    if not 1 / AGREEMENT < layers / whole < AGREEMENT:
        logger.warning(
            "The layers' latencies add up to %.3g s and the model's is %.3g s: the machine was busy, or the "
            "layers are too small to be timed one by one. Speed-ups may differ from the prediction. Measure again "
            "when the machine is idle, after deleting the latency_table if there is one.",
            layers,
            whole,
        )


@torch.no_grad()
def seconds_of_phases(model: PreTrainedModel, config: PruningConfig, table: LatencyTable | None) -> dict[str, float]:
    """Return the seconds of a model in every phase that a request asks for; empty where it asks for none, or where the
    latencies in the table are those of another program."""
    if config.target_speedup is None or table is None or not table.is_of_this_program:
        return {}
    phases = shares_of_phases(config.speed_of)
    return ranks.from_main(lambda: {phase: phase_seconds(model, config, phase) for phase in phases})


def phase_seconds(model: PreTrainedModel, config: PruningConfig, phase: str) -> float:
    """Return the median seconds of a phase: of a forward pass over a prompt without logits, or over one new token with
    a KV cache and, if the model has a head, logits."""
    prompt = _prompt_ids(model, config.phase_tokens[phase]).to(model.device)
    with evaluating(model), products_as_served():
        if phase == Phase.PREFILL:
            call = lambda: model.base_model(input_ids=prompt, use_cache=False)  # noqa: E731
        else:
            cache, token = filled_cache(model, prompt), prompt[:, -1:]
            filled = cache.layers

            def call() -> Any:
                # The same tokens are in the cache before every run.
                cache.layers = list(map(copy.copy, filled))
                return model(input_ids=token, past_key_values=cache, use_cache=True)

        return median_seconds([TimedRun(model, 1, call)], REPEATS, model.device)[0]


def measured_speedup(before: Mapping[str, float], after: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """Return the speed-up by the seconds of every phase before and after, and the shares of the time before."""
    return 1 / sum(share * after[phase] / before[phase] for phase, share in shares.items())


def circumstances(model: PreTrainedModel, widest: Mapping[str, Site], config: PruningConfig) -> dict[str, Any]:
    """Return the circumstances of a measurement of a model in this process (see [`LatencyTable`])."""
    on_cpu = model.device.type == "cpu"
    machine = {
        "device": _name_of(model.device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "dtype": str(model.dtype),
        "attention": model.config.get_text_config()._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers_version,
    }
    shape = {
        "model_type": model.config.model_type,
        "layers": model.config.get_text_config().num_hidden_layers,
        "shapes": {shape: site.num_units for shape, site in widest.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return {"runtime": HERE, "machine": machine, "model": shape, "multiple_of": config.multiple_of}


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_processor()}".rstrip()


def _processor() -> str:
    """Return the name of the processor; empty where the system does not tell it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def check_length(model: PreTrainedModel, config: PruningConfig, phase: str) -> None:
    """Raise `ValueError` where the tokens of a phase are more than the positions of the model."""
    longest = positions_of(model.config)
    option, needed = "latency_tokens", config.phase_tokens[phase]
    if phase == Phase.DECODE:
        option, needed = "latency_context" if config.latency_context is not None else option, needed + 1
    if longest is not None and needed > longest:
        new = " and the new token" if phase == Phase.DECODE else ""
        verb = "are" if new else "is"
        raise ValueError(
            f"{option}={config.phase_tokens[phase]}{new} {verb} more than the {longest} positions of the model."
        )


def _prompt_ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
