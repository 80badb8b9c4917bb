"""Block influence: the change of direction of the residual stream by a layer (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from .scoring import DEPTH_KINDS, ScoringInputs


@dataclass
class BlockInfluenceConfig(PruningConfig):
    """The change of direction of the residual stream by a layer or sublayer; it takes one pass over the text.

    The score is 1 - mean cosine between the residual stream before and after the layer or sublayer, over all tokens
    (arXiv 2403.03853, eq. 1).
    """

    method: str = "block_influence"


def score(inputs: ScoringInputs) -> dict:
    from ..influence import block_influence

    return block_influence(inputs)


register_method(BlockInfluenceConfig, score, calibrated=True, kinds=DEPTH_KINDS)
