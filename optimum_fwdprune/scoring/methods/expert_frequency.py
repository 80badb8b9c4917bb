"""Frequency: how many of the calibration tokens are routed to an expert."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from .scoring import EXPERT_KINDS, ScoringInputs


@dataclass
class ExpertFrequencyConfig(PruningConfig):
    """The share of the calibration tokens that are routed to the expert."""

    method: str = "expert_frequency"


def score(inputs: ScoringInputs) -> dict:
    scores = {}
    for site in inputs.sites:
        statistics = inputs.statistics[site.key]
        assert statistics.routed is not None
        scores[site.key] = statistics.routed / statistics.count
    return scores


register_method(ExpertFrequencyConfig, score, statistics=("moments",), additive=False, kinds=EXPERT_KINDS)
