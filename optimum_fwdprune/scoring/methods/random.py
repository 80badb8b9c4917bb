"""Random scores, as a baseline for other criteria."""

from __future__ import annotations

from dataclasses import dataclass

from ...request.config import PruningConfig, register_method
from .scoring import EVERY_KIND, ScoringInputs


@dataclass
class RandomConfig(PruningConfig):
    """Random numbers, by `seed`: a baseline for other methods."""

    method: str = "random"


def score(inputs: ScoringInputs) -> dict:
    import torch

    generator = torch.Generator().manual_seed(inputs.config.seed)
    if units := inputs.depth_units:
        return {unit.key: torch.rand(1, generator=generator, dtype=torch.float32) for unit in units}
    return {site.key: torch.rand(site.num_units, generator=generator, dtype=torch.float32) for site in inputs.sites}


# It is not additive, so that heads and channels are removed with equal probability.
register_method(RandomConfig, score, additive=False, kinds=EVERY_KIND)
