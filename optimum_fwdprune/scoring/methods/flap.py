"""FLAP: how much an input feature fluctuates, and the bias that replaces its mean (arXiv 2312.11983)."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...request.registry import register_preset
from .scoring import ScoringInputs


@dataclass
class FlapConfig(PruningConfig):
    """How much a unit's input features fluctuate, weighted by the weights that read them.

    The score of a feature is Var(X_j) · Σ_i W[i, j]², standardised per site; that of a unit is the mean over its
    features. The preset `"flap-paper"` has the paper's own setting (AL-AM): all sites compete, and the mean output of
    the removed features becomes a bias of the projection.
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
register_method(FlapConfig, score, statistics=("moments",), additive=False)
register_preset(
    "flap-paper",
    "FLAP as published (AL-AM): all layers, heads and channels compete, and a bias replaces the mean of what went.",
    method="flap",
    kinds=["attention", "mlp"],
    scope="global",
    budget="joint",
    attention_unit="kv_group",
    skip_layers=[],
    reconstruction="bias",
    calibration="wikitext2",
    n_samples=1024,
    seq_len=128,
)
