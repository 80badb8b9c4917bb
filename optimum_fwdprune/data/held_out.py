"""Calibration windows that are not calibrated on, for measurements."""

from __future__ import annotations

from collections.abc import Callable

from .calibration import Calibration


# This share of further calibration windows is drawn, and at least so many.
SHARE, FEWEST = 8, 8


def windows_and_held_out(n_samples: int, load: Callable[[int], Calibration]) -> tuple[Calibration, Calibration]:
    """Draw an eighth more calibration windows than a request has; return `n_samples` windows, and the others.

    Args:
        n_samples (`int`): the number of windows of the request.
        load (`Callable`): returns the calibration windows of the request and a number of further ones. If it returns
            fewer, both parts are smaller.

    Raises:
        ValueError: where `load` raises it, or there is only one window.
    """
    more = max(FEWEST, n_samples // SHARE)
    try:
        drawn = load(more)
    except ValueError as error:
        raise ValueError(f"{error} {more} of the windows are held out, to measure models on.") from error
    number = max(1, round(len(drawn) * more / (n_samples + more)))
    if number == len(drawn):
        raise ValueError("There is only one calibration window, so that none can be held out; use longer texts.")
    first, second = slice(0, len(drawn) - number), slice(len(drawn) - number, None)
    return drawn.part(first), drawn.part(second)
