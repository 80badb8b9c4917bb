"""Magnitude: scores by the norm of the weights that a unit owns. It needs no calibration text."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from ...runs.progress import progress
from .scoring import EVERY_KIND, ScoringInputs


@dataclass
class MagnitudeConfig(PruningConfig):
    """The L2 norm of the weights that a unit owns: rows of its sources with biases, and columns of its projection.

    The score of a layer or sublayer is the norm of all weights that its units own.
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
