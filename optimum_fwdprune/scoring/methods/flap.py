"""FLAP: scores by the fluctuation of input features, and a bias that replaces their mean (arXiv 2312.11983)."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...request.registry import register_preset
from .scoring import ScoringInputs


@dataclass
class FlapConfig(PruningConfig):
    """The fluctuation of a unit's input features, times the squared weights that read them.

    The score of a feature is Var(X_j) · Σ_i W[i, j]², standardized per site; that of a unit is the mean over its
    features. The preset `"flap-paper"` has the paper's own setting (AL-AM): all sites compete, and the mean output of
    the removed features becomes a bias of the projection.
    """

    method: str = "flap"


def score(inputs: ScoringInputs) -> dict:
    scores = {}
    for site in inputs.sites:
        columns = site.projection.weight.detach().float().square().sum(0)
        fluctuation = columns * inputs.statistics[site.key].variance
        # A constant metric, for example of dead features, must become zero and not NaN.
        standardised = (fluctuation - fluctuation.mean()) / fluctuation.std().clamp_min(1e-30)
        scores[site.key] = site.sum_features(standardised) / site.unit_width
    return scores


# Standardized scores are ranked directly, as in FLAP's code; they are not additive.
register_method(FlapConfig, score, statistics=("moments",), additive=False, by_site=True)
register_preset(
    "flap-paper",
    "FLAP as published (AL-AM): all layers, heads and channels compete, and a bias replaces the mean output of the "
    "removed units.",
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
