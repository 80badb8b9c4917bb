"""Wanda-sp: weight times activation norm, summed over a unit (Wanda, arXiv 2306.11695, structured as in FLAP)."""

from __future__ import annotations

from dataclasses import dataclass

from ..configuration import PruningConfig, register_method
from .scoring import ScoringInputs


@dataclass
class WandaSpConfig(PruningConfig):
    """Score of a unit: the sum over its projection columns j of Σ_i |W[i, j]| · ‖X_j‖₂.

    Unless `reconstruction` says otherwise, least squares refits the kept columns; `"none"` is the published method.
    """

    method: str = "wanda_sp"


def score(inputs: ScoringInputs) -> dict:
    scores = {}
    for site in inputs.sites:
        columns = site.projection.weight.detach().abs().float().sum(0)
        scores[site.key] = site.sum_features(columns * inputs.statistics[site.key].norm)
    return scores


register_method(WandaSpConfig, score, statistics=("moments",), reconstruction="least_squares")
