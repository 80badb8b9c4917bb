"""REAP: the mean contribution of an expert to the output of its mixture, over the tokens that are routed to it."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from .scoring import EXPERT_KINDS, ScoringInputs


@dataclass
class ReapConfig(PruningConfig):
    """Router weight times the L2 norm of the expert's output, averaged over the tokens that are routed to the expert.

    The score is Σ g(x) · ‖f(x)‖₂ / n over the n calibration tokens x that are routed to the expert, with its router
    weight g and its output f, and 0 where no token is (Router-weighted Expert Activation Pruning, Cerebras, arXiv
    2510.13999).
    """

    method: str = "reap"


def score(inputs: ScoringInputs) -> dict:
    scores = {}
    for site in inputs.sites:
        statistics = inputs.statistics[site.key]
        assert statistics.routed is not None
        # The mean is over all tokens, and is 0 where the expert is not used.
        scores[site.key] = statistics.mean * statistics.count / statistics.routed.clamp_min(1)
    return scores


register_method(ReapConfig, score, statistics=("moments",), additive=False, kinds=EXPERT_KINDS)
