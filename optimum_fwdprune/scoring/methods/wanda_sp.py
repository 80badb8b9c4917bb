"""Wanda-sp: weight times activation norm, summed over a unit (Wanda, arXiv 2306.11695, structured as in FLAP)."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...request.registry import register_preset
from .scoring import ScoringInputs


@dataclass
class WandaSpConfig(PruningConfig):
    """The weights that read a unit times the size of its activations: Σ_j Σ_i |W[i, j]| · ‖X_j‖₂.

    The sum is over the columns j of the output projection that belong to the unit. The preset `"wanda-sp-paper"` has
    the published form, without reconstruction.
    """

    method: str = "wanda_sp"


def score(inputs: ScoringInputs) -> dict:
    scores = {}
    for site in inputs.sites:
        columns = site.projection.weight.detach().abs().float().sum(0)
        scores[site.key] = site.sum_features(columns * inputs.statistics[site.key].norm)
    return scores


register_method(WandaSpConfig, score, statistics=("moments",), by_site=True)
register_preset(
    "wanda-sp-paper",
    "Wanda-sp as FLAP's authors published it: every layer loses the same share of heads and channels.",
    method="wanda_sp",
    kinds=["attention", "mlp"],
    scope="layer",
    budget="separate",
    attention_unit="kv_group",
    skip_layers=[],
    reconstruction="none",
    calibration="wikitext2",
    n_samples=1024,
    seq_len=128,
)
