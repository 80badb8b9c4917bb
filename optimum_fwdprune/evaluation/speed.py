"""Benchmarks: the speed and size of models, measured in turns."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from ..architectures import as_linear
from ..architectures.positions import positions_of
from ..architectures.sizes import ModelSizes
from ..loading.offloading import input_device
from ..loading.state import check_not_consumed, evaluating
from ..models.resizing import LINEARS
from ..runs.clock import synchronize
from ..runs.loggers import get_logger
from ..runs.products import products_as_served, warn_of_slow_products
from ..runs.progress import progress
from .memory import PeakMemory


logger = get_logger(__name__)

# Kernels that torch's counter does not count.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, out_shape=None, **__: sdpa_flop_count(query, key, value)
    )
}

# Matrix kernels work on tiles; a width that is no multiple of this wastes a part of the last tile.
TILE = 8

# A speed-up below this ratio counts as none.
NOT_FASTER = 1.02


@dataclass(frozen=True)
class Spread:
    """Seconds of repeated runs.

    Args:
        median, low, high (`float`): the median, and the lower and upper quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Speed at one size of batch and prompt.

    Args:
        batch_size, prompt_tokens (`int`): number of prompts, and of tokens per prompt.
        prefill (`Spread`): times of one forward pass over the prompts, which is the latency of the first new token.
        decode (`Spread`): times of one further token for every prompt, with a key-value cache.
    """

    batch_size: int
    prompt_tokens: int
    prefill: Spread
    decode: Spread

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second."""
        return self.batch_size * self.prompt_tokens / self.prefill.median

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second, for all prompts together."""
        return self.batch_size / self.decode.median


@dataclass(frozen=True)
class Benchmark:
    """Size and speed of a model.

    Args:
        parameters (`int`): number of parameters, tied weights counted once.
        bytes (`int`): size of these parameters in a safetensors file.
        macs_per_token (`float`): multiply-accumulate operations per token of a prefill of the first prompt length.
        peak_bytes (`int`): size of the weights, and the memory that the largest prefill with its cache and a decoding
            step need in addition.
        timings (`list[Timing]`): one per size of batch and prompt.
    """

    parameters: int
    bytes: int
    macs_per_token: float
    peak_bytes: int
    timings: list[Timing]


@torch.no_grad()
def benchmark(
    models: Sequence[PreTrainedModel] | Mapping[str, PreTrainedModel],
    batch_sizes: Sequence[int] = (1,),
    prompt_tokens: Sequence[int] = (512,),
    new_tokens: int = 16,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Benchmark]:
    """Measure prefill and decoding times, memory and size of models.

    The models take turns after every run, so that other load on the machine slows all of them. Compare results of one
    call only. A first round of all runs warms up and is not counted.

    Args:
        models (sequence of `PreTrainedModel`, or mapping of `str` to it): causal language models, by name if they have
            names. The others are compared with the first one, and a warning names those that are not faster, with the
            likely reason.
        batch_sizes (sequence of `int`, defaults to `(1,)`): numbers of prompts; every one is timed with all
            `prompt_tokens`.
        prompt_tokens (sequence of `int`, defaults to `(512,)`): lengths of the prompts.
        new_tokens (`int`, defaults to 16): decoding steps after each prefill.
        repeats (`int`, defaults to 5): timed runs, whose median and quartiles are returned. With 0 nothing is timed,
            and memory, multiplications and size alone are measured.
        clock (`Callable`, defaults to `time.perf_counter`): returns seconds. On a shared CPU and with one thread,
            `time.process_time` does not count the time of other processes.

    Raises:
        ValueError: where a prompt with its new tokens is too long for a model, or a model was consumed by pruning.
    """
    if not models:
        raise ValueError("There is no model to measure.")
    if not isinstance(models, Mapping):
        models = {f"model {place}": model for place, model in enumerate(models, 1)}
    (first_name, *others), models = models, list(models.values())
    if min(*batch_sizes, *prompt_tokens, new_tokens) < 1:
        raise ValueError("batch_sizes, prompt_tokens and new_tokens must be at least 1.")
    if repeats < 0:
        raise ValueError(f"repeats must be at least 0; got {repeats}.")
    for model in models:
        check_not_consumed(model)
        longest = positions_of(model.config)
        if longest is not None and max(prompt_tokens) + new_tokens > longest:
            raise ValueError(
                f"{max(prompt_tokens)} prompt tokens and {new_tokens} new ones are more than the {longest} positions "
                f"of the {type(model).__name__}; lower prompt_tokens or new_tokens."
            )
    if repeats:
        warn_of_slow_products(models[0])
    vocab_size = min(model.config.get_text_config().vocab_size for model in models)
    sizes = [(batch, prompt) for batch in batch_sizes for prompt in prompt_tokens] if repeats else []
    timings: list[list[Timing]] = [[] for _ in models]
    for batch_size, tokens in progress(sizes, "Timing prompts", unit="size"):
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(vocab_size, (batch_size, tokens), generator=generator)
        runs = [functools.partial(_generate, model, prompts, new_tokens, clock) for model in models]
        for own_timings, (prefill, decode) in zip(timings, _take_turns(runs, repeats)):
            own_timings.append(Timing(batch_size, tokens, prefill, decode))
    largest = torch.zeros(max(batch_sizes), max(prompt_tokens), dtype=torch.int64)
    first = torch.zeros(1, prompt_tokens[0], dtype=torch.int64)
    measured = [_sized(model, own_timings, first, largest) for model, own_timings in zip(models, timings)]
    for number, name in enumerate(others, 1):
        for reason in slower_because(models[0], models[number], measured[0], measured[number]):
            logger.warning("%s is not faster than %s: %s", name, first_name, reason)
    return measured


def slower_because(dense: PreTrainedModel, pruned: PreTrainedModel, before: Benchmark, after: Benchmark) -> list[str]:
    """Return likely reasons where `pruned` is not faster than `dense`: a sentence per size that was timed."""
    reasons = []
    for old, new in zip(before.timings, after.timings):
        size = f"{new.batch_size} x {new.prompt_tokens} tokens"
        if old.prefill.median < NOT_FASTER * new.prefill.median:
            why = _prefill_reason(dense, pruned, before, after)
            ratio = old.prefill.median / new.prefill.median
            reasons.append(f"prefill of {size} is {ratio:.2f} times as fast; {why}")
        if old.decode.median < NOT_FASTER * new.decode.median:
            ratio = old.decode.median / new.decode.median
            reasons.append(f"decoding after {size} is {ratio:.2f} times as fast; {_decode_reason(before, after)}")
    return reasons


def _prefill_reason(dense: PreTrainedModel, pruned: PreTrainedModel, before: Benchmark, after: Benchmark) -> str:
    odd = len(_odd_widths(pruned)) - len(_odd_widths(dense))
    if after.macs_per_token > 0.95 * before.macs_per_token:
        return f"it saves only {1 - after.macs_per_token / before.macs_per_token:.0%} of the multiplications."
    if odd > 0:
        return (
            f"{odd} of its linears have widths that are no multiple of {TILE}, for which kernels are slow; prune with "
            f"multiple_of={8 * TILE}."
        )
    return "fixed costs exceed those of computations of this size, or the machine was busy; try longer prompts."


def _decode_reason(before: Benchmark, after: Benchmark) -> str:
    saved = 1 - after.bytes / before.bytes
    return (
        f"a decoding step reads all weights once, of which {saved:.0%} were removed (embeddings and the vocabulary "
        f"projection stay), and has fixed costs in addition."
    )


def _odd_widths(model: PreTrainedModel) -> list[nn.Linear]:
    linears = [as_linear(module) for module in model.base_model.modules() if isinstance(module, LINEARS)]
    return [linear for linear in linears if linear.in_features % TILE or linear.out_features % TILE]


def _generate(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Prefill and decode greedily; return the seconds of the prefill, and of one decoding step."""
    device = input_device(model)
    prompts = prompts.to(device)
    with evaluating(model), products_as_served():
        synchronize(device)
        start = clock()
        outputs = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        synchronize(device)
        prefilled = clock()
        for _ in range(new_tokens):
            token = outputs.logits[:, -1:].argmax(-1)
            outputs = model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)
        synchronize(device)
    return prefilled - start, (clock() - prefilled) / new_tokens


def _take_turns(runs: Sequence[Callable[[], tuple[float, float]]], repeats: int) -> list[tuple[Spread, Spread]]:
    seconds: list[list[tuple[float, float]]] = [[] for _ in runs]
    turns = [turn for _ in range(repeats + 1) for turn in zip(runs, seconds)]
    for run, taken in progress(turns, "Timing", unit="run"):
        taken.append(run())
    # The first run warms up kernels and caches, and is not counted.
    return [
        (Spread.of([prefill for prefill, _ in taken[1:]]), Spread.of([decode for _, decode in taken[1:]]))
        for taken in seconds
    ]


def _sized(model: PreTrainedModel, timings: list[Timing], first: torch.Tensor, largest: torch.Tensor) -> Benchmark:
    sizes = ModelSizes.of(model)
    with PeakMemory(input_device(model)) as peak:
        _generate(model, largest, 1)
    counter: Any = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with counter, evaluating(model):
        model(input_ids=first.to(input_device(model)), use_cache=False, logits_to_keep=1)
    return Benchmark(
        parameters=sizes.parameters,
        bytes=sizes.bytes,
        macs_per_token=counter.get_total_flops() / 2 / first.numel(),
        peak_bytes=sizes.bytes + peak.bytes,
        timings=timings,
    )
