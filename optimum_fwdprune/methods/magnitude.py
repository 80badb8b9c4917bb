"""Magnitude: the norm of the weights that a unit owns. Needs no text."""

from __future__ import annotations

from dataclasses import dataclass

from ..configuration import PruningConfig, register_method
from .scoring import ScoringInputs


@dataclass
class MagnitudeConfig(PruningConfig):
    """Units whose owned weights (source rows with biases, projection columns) have the smallest L2 norm go first."""

    method: str = "magnitude"


def score(inputs: ScoringInputs) -> dict:
    return {site.key: _owned_squares(site).sqrt() for site in inputs.sites}


def _owned_squares(site):
    total = 0
    for coupling in site.couplings:
        for _, parameter in coupling.parameters():
            squares = parameter.detach().float().square()
            along_axis = squares.sum(1 - coupling.axis) if squares.dim() == 2 else squares
            total = total + coupling.sum_per_unit(site.num_units, along_axis)
    return total


register_method(MagnitudeConfig, score)
