"""The influence of layers and sublayers on the residual stream, measured layer by layer in one pass."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

from ..architectures import Site, SiteKey
from ..forward.gates import gated
from ..forward.layerwise import Batch, LayerRunner
from ..loading.offloading import resident
from ..request.choices import DepthKind
from ..runs import ranks
from ..runs.devices import on_host, precise_sum
from ..runs.progress import progress
from .methods.scoring import ScoringInputs


@torch.no_grad()
def block_influence(inputs: ScoringInputs) -> dict[SiteKey, torch.Tensor]:
    """Return 1 - mean cosine of the residual stream before and after every layer or sublayer, by its key.

    The stream between the sublayers of a layer is the output of the layer without its later sublayer. The memory of
    the host holds the hidden states of all windows, and the parameters of one layer are in memory at a time. With
    several processes, each runs a share of the windows.

    Args:
        inputs (`ScoringInputs`): the inputs of a request for layers or sublayers.
    """
    runner, units = LayerRunner(inputs.model), inputs.depth_units
    share = inputs.calibration.own_share()
    batches = [] if share is None else runner.batches(share, inputs.config.batch_size)
    hidden = [on_host(runner.embed(batch)) for batch in batches]
    whole = inputs.config.depth_kind == DepthKind.LAYER
    scores: dict[SiteKey, torch.Tensor] = {}
    for number, layer in enumerate(progress(runner.layers, "Measuring influence", unit="layer")):
        of_layer = [unit for unit in units if unit.key.layer == number]
        sums = torch.zeros(len(of_layer) + 1, dtype=torch.float64)
        with resident(layer):
            for place, batch in enumerate(batches):
                later = [] if whole else [site for unit in of_layer[1:] for site in unit.sites]
                states = _states(runner, number, batch, hidden[place], later)
                for which, (before, after) in enumerate(pairwise(states)):
                    sums[which] += _turned(batch, before, after)
                sums[-1] += len(batch.tokens(states[0]))
                hidden[place] = on_host(states[-1])
        sums = ranks.summed(sums)
        for unit, turned in zip(of_layer, sums):
            scores[unit.key] = (turned / sums[-1]).float()[None]
    return scores


def _states(
    runner: LayerRunner, number: int, batch: Batch, hidden: torch.Tensor, later: list[Site]
) -> list[torch.Tensor]:
    """Return the residual stream before a layer, before its `later` sublayer if there is one, and after the layer."""
    after = runner.run(number, batch, hidden)
    states = [hidden.to(after.device), after]
    if later:
        with gated(later, {site.key: torch.zeros(site.num_units) for site in later}):
            states.insert(1, runner.run(number, batch, hidden))
    return states


def _turned(batch: Batch, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    cosines = F.cosine_similarity(batch.tokens(before).float(), batch.tokens(after).float(), dim=-1)
    return precise_sum(1 - cosines).cpu()
