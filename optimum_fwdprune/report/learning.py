"""The history of a run that learned its masks, reduced to as many points as a picture or a table shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..architectures.site import SiteKey
from ..request.choices import WIDTH_KINDS


if TYPE_CHECKING:
    from torch import Tensor


def learning_of(history: Mapping[str, Tensor], points: int = 400) -> dict[str, Any]:
    """Return a history as JSON values, divided into stretches of equally many steps.

    Args:
        history (mapping of `str` to `Tensor[steps]`): the history of [`Scores`].
        points (`int`, defaults to 400): largest number of stretches.

    Returns:
        `dict`: with an entry per stretch: `steps`, its last step; `loss`, its mean loss; `smooth_loss`, the mean loss
        of the `smoothed_over` steps that end with it; `None` stands for a mean of no finite value. `entropy` and
        `expected_sparsity`, which are `None` where the history has none, and `keep_rates` by kind and layer, are those
        of its last step. `stretch` is the number of steps of a stretch, and `smoothed_over` a twentieth of all steps.

    Raises:
        ValueError: where there is no history, because the method does not learn, or took no step.
    """
    steps = len(history["loss"]) if "loss" in history else 0
    if not steps:
        raise ValueError("There is no history of learning: the method does not learn, or took no step.")
    stretch = -(-steps // points)
    lasts = [min(first + stretch, steps) for first in range(0, steps, stretch)]
    window = max(1, steps // 20)
    loss = history["loss"].double()
    keep_rates: dict[str, dict[str, list[float]]] = {str(kind): {} for kind in WIDTH_KINDS}
    for name, values in history.items():
        if name.startswith("keep_rate."):
            key = SiteKey.parse(name.removeprefix("keep_rate."))
            keep_rates[key.kind][str(key.layer)] = _at(values, lasts)
    return {
        "steps": lasts,
        "loss": [_finite(float(loss[max(0, last - stretch) : last].nanmean())) for last in lasts],
        "smooth_loss": [_finite(float(loss[max(0, last - window) : last].nanmean())) for last in lasts],
        "stretch": stretch,
        "smoothed_over": window,
        **{name: _at(history[name], lasts) if name in history else None for name in ("entropy", "expected_sparsity")},
        "keep_rates": keep_rates,
    }


def _at(values: Tensor, lasts: list[int]) -> list[float]:
    return [float(values[last - 1]) for last in lasts]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
