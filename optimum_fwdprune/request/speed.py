"""The phases of a generation whose time `target_speedup` reduces, and their shares."""

from __future__ import annotations

import math

from ..words import did_you_mean
from .choices import Phase


def shares_of_phases(speed_of: str) -> dict[str, float]:
    """Return the shares of the dense model's time that phases take, by phase; their sum is 1.

    Args:
        speed_of (`str`): the option of a request: a phase, or phases with numbers in proportion to their time, such as
            `"prefill:0.5,decode:0.5"`.

    Raises:
        ValueError: where it is something else; the message names the values that are possible.
    """
    shares: dict[str, float] = {}
    for part in speed_of.split(","):
        name, colon, number = (text.strip() for text in part.partition(":"))
        if name not in list(Phase):
            raise ValueError(f"{_expected(speed_of)} {name!r} is no phase.{did_you_mean(name, Phase)}")
        if name in shares:
            raise ValueError(f"{_expected(speed_of)} {name} occurs twice.")
        try:
            shares[name] = float(number) if colon else 1.0
        except ValueError:
            raise ValueError(f"{_expected(speed_of)} {number!r} is no number.") from None
        if not 0 < shares[name] < math.inf:
            raise ValueError(f"{_expected(speed_of)} The share of a phase must be above 0.")
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _expected(speed_of: str) -> str:
    phases = " or ".join(Phase)
    return f"speed_of must be {phases}, or shares of them such as prefill:0.5,decode:0.5; got {speed_of!r}."
