"""Budgets of a training in tokens or in time, as a user writes them. Importing them does not import torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..request.sizes import count_of


# Passes over the data up to which a budget repeats it: up to four, repeated text is nearly worth as much as new text
# (Muennighoff et al., arXiv 2305.16264).
MOST_PASSES = 4

_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", re.IGNORECASE)


def tokens_of(text: str | int) -> int:
    """Return a number of tokens such as `"500K"`, `"1M"`, `"1.5M"` or `"250000"`.

    Raises:
        ValueError: where the text is no such number, or it is 0.
    """
    count = count_of(str(text))
    if not count:
        raise ValueError(f"tokens={text!r} is no number of tokens; write 500K, 1M or 250000.")
    return count


def seconds_of(text: str) -> float:
    """Return a time such as `"90s"`, `"30m"`, `"2h"` or `"1h30m"` in seconds.

    Raises:
        ValueError: where the text is no such time, or it is 0.
    """
    matched = _TIME.fullmatch(str(text).strip())
    seconds = 0.0
    if matched is not None:
        seconds = sum(float(part or 0) * factor for part, factor in zip(matched.groups(), (3600, 60, 1)))
    if not seconds:
        raise ValueError(f"time={text!r} is no time; write 90s, 30m, 2h or 1h30m.")
    return seconds


def in_words(seconds: float) -> str:
    """Return a time in the unit that suits it: `"40 seconds"`, `"12 minutes"`, `"3.5 hours"`."""
    if seconds < 100:
        return f"{max(1, math.ceil(seconds))} seconds"
    return f"{math.ceil(seconds / 60)} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


@dataclass(frozen=True)
class Steps:
    """The number of steps that a budget pays for.

    Args:
        steps (`int`): optimizer steps.
        tokens (`int`): tokens that they read, approximately.
        passes (`float`): how often they read all of the data.
    """

    steps: int
    tokens: int
    passes: float


def steps_for_tokens(budget: int, available: int, per_step: float) -> Steps:
    """Return the steps that read a number of tokens.

    Args:
        budget (`int`): the tokens to read.
        available (`int`): the tokens of the data.
        per_step (`float`): mean number of tokens per step.

    Raises:
        ValueError: where the data would be read more than `MOST_PASSES` times.
    """
    passes = budget / available
    if passes > MOST_PASSES:
        raise ValueError(
            f"tokens={budget:,} reads the data, which has {available:,} tokens, {passes:.1f} times; more than "
            f"{MOST_PASSES} passes gain little. Train on more text, lower tokens to {MOST_PASSES * available:,}, or "
            f"set num_train_epochs instead."
        )
    steps = max(1, round(budget / per_step))
    return Steps(steps, round(steps * per_step), passes)


def steps_for_time(seconds: float, per_step_seconds: float, available: int, per_step: float) -> Steps:
    """Return the steps that a time is enough for; they end after `MOST_PASSES` passes over the data.

    Args:
        seconds (`float`): the time.
        per_step_seconds (`float`): the time of a step.
        available (`int`): the tokens of the data.
        per_step (`float`): mean number of tokens per step.

    Raises:
        ValueError: where the time is not enough for a single step.
    """
    affordable = int(seconds / per_step_seconds)
    if not affordable:
        raise ValueError(
            f"A step takes about {in_words(per_step_seconds)}, more than time allows. Allow more time, or lower "
            f"per_device_train_batch_size, gradient_accumulation_steps or max_length."
        )
    steps = min(affordable, max(1, math.floor(MOST_PASSES * available / per_step)))
    return Steps(steps, round(steps * per_step), steps * per_step / available)
