"""The kinds of reconstruction, and the statistics that each of them reads."""

from __future__ import annotations

from ..forward.statistics import (
    MOMENTS,
)


NONE, BIAS, LEAST_SQUARES = "none", "bias", "least_squares"


INDEPENDENT = "independent"


# Statistics that scoring gathers along the way where this kind of reconstruction will follow.
STATISTICS_OF: dict[str, tuple[str, ...]] = {NONE: (), BIAS: (MOMENTS,), LEAST_SQUARES: ()}
