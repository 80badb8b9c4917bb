"""The statistics that every kind of reconstruction needs."""

from __future__ import annotations

from ..forward.statistics import MOMENTS
from ..request.choices import ReconstructionKind


# Statistics that scoring collects for a reconstruction of this kind.
STATISTICS_OF: dict[str, tuple[str, ...]] = {
    ReconstructionKind.NONE: (),
    ReconstructionKind.BIAS: (MOMENTS,),
    ReconstructionKind.LEAST_SQUARES: (),
}
