"""The statistics that each kind of reconstruction reads."""

from __future__ import annotations

from ..forward.statistics import MOMENTS
from ..request.choices import ReconstructionKind


# Statistics that scoring gathers along the way where this kind of reconstruction will follow.
STATISTICS_OF: dict[str, tuple[str, ...]] = {
    ReconstructionKind.NONE: (),
    ReconstructionKind.BIAS: (MOMENTS,),
    ReconstructionKind.LEAST_SQUARES: (),
}
