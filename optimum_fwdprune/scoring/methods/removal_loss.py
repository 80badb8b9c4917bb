"""Removal loss: layers, sublayers or experts are removed one by one, by the effect of it on the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...request.fields import option
from .scoring import DEPTH_KINDS, EXPERT_KINDS, ScoringInputs, UnitScores


@dataclass
class RemovalLossConfig(PruningConfig):
    """The change of predictions by removing a layer, sublayer or expert, which is measured again after every removal.

    The change is the KL divergence of the dense model's next-token distributions from those of the model without what
    is removed (greedy as in SLEB, arXiv 2402.09025, and BlockPruner, arXiv 2406.10594). Of experts, every layer loses
    one after the other, from the last layer to the first, and then the next ones.
    """

    method: str = "removal_loss"
    removal_windows: int = option(32, "Number of calibration windows, from the first, to measure removals on.")

    def __post_init__(self):
        super().__post_init__()
        if self.removal_windows < 1:
            raise ValueError(f"removal_windows must be at least 1; got {self.removal_windows}.")


def score(inputs: ScoringInputs) -> UnitScores:
    from ..expert_removal import expert_removal_order
    from ..removal import removal_order

    return expert_removal_order(inputs) if inputs.config.prunes_experts else removal_order(inputs)


register_method(
    RemovalLossConfig,
    score,
    calibrated=True,
    kinds=(*DEPTH_KINDS, *EXPERT_KINDS),
    # Their number depends on how many layers or experts there are.
    windows=lambda _config: None,
)
