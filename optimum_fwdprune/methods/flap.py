"""FLAP: how much an input feature fluctuates, and the bias that replaces its mean (arXiv 2312.11983)."""

from __future__ import annotations

from dataclasses import dataclass

from ..configuration import PruningConfig, register_method
from .scoring import ScoringInputs


@dataclass
class FlapConfig(PruningConfig):
    """Score of a feature: Var(X_j) · Σ_i W[i, j]², standardised per site; of a unit: the mean over its features.

    The paper's own setting (AL-AM) is `scope="global", budget="joint"`. Unless `reconstruction` says otherwise, the
    removed features' mean output becomes a bias of the projection.
    """

    method: str = "flap"


def score(inputs: ScoringInputs) -> dict:
    scores = {}
    for site in inputs.sites:
        columns = site.projection.weight.detach().float().square().sum(0)
        fluctuation = columns * inputs.statistics[site.key].variance
        # A constant metric (all dead features) standardises to zero rather than to NaN.
        standardised = (fluctuation - fluctuation.mean()) / fluctuation.std().clamp_min(1e-30)
        scores[site.key] = site.sum_features(standardised) / site.unit_width
    return scores


# Standardised scores are ranked as they are, as in FLAP's code; they are no amounts that could be added up.
register_method(FlapConfig, score, statistics=("moments",), additive=False, reconstruction="bias")
