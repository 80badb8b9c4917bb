"""Magnitude: the norm of the weights that a unit owns. Needs no text."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...runs.progress import progress
from .scoring import EVERY_KIND, ScoringInputs


@dataclass
class MagnitudeConfig(PruningConfig):
    """Units whose owned weights (source rows with biases, projection columns) have the smallest L2 norm go first.

    Layers and sublayers go by the norm of all weights that their units own.
    """

    method: str = "magnitude"


def score(inputs: ScoringInputs) -> dict:
    scores: dict = {}
    for site in progress(inputs.sites, "Scoring", unit="site"):
        for coupling, parameter in site.owned_parameters():
            squares = parameter.detach().float().square()
            scores[site.key] = scores.get(site.key, 0) + site.sum_owned(coupling, parameter, squares)
    if units := inputs.depth_units:
        return {unit.key: sum(scores[site.key].sum() for site in unit.sites).sqrt()[None] for unit in units}
    return {key: squares.sqrt() for key, squares in scores.items()}


register_method(MagnitudeConfig, score, kinds=EVERY_KIND)
