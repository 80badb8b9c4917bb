"""Reconstruction layer by layer: every projection is refitted on what the layers pruned before it make of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .architectures import Site, SiteKey
from .calibration import Calibration
from .gates import Projection, replaced_projections
from .layerwise import Batch, LayerRunner, outputs_of, stopped_before
from .least_squares import NormalEquations, Refit, refit
from .utils import progress


LAYER, DENSE = "layer", "dense"


@torch.no_grad()
def refit_in_sequence(
    model: PreTrainedModel,
    sites: Sequence[Site],
    kept: Mapping[SiteKey, list[int]],
    target: str,
    ridge: float | None,
    fit: Calibration,
    held_out: Calibration | None,
    batch_size: int,
) -> tuple[dict[SiteKey, Projection], dict[SiteKey, Refit]]:
    """Return new projection parameters of every site that loses units, first layer to last.

    One layer's normal equations are in memory at a time, and the hidden states of all windows: twice for the target
    `"dense"`. It costs about three passes of the layers over the tokens, four for `"dense"`.

    Args:
        model (`PreTrainedModel`): the dense model; it is not changed.
        sites (sequence of `Site`): its sites, in the order in which they write to the residual stream.
        kept (mapping of site key to `list[int]`): units that stay.
        target (`str`): `"layer"` fits what the whole projection makes of these inputs, `"dense"` what would undo the
            error that the residual stream has gathered so far as well.
        ridge (`float`, *optional*): for all sites; by default chosen per site on `held_out`.
        fit, held_out (`Calibration`, the second *optional*): the tokens.
        batch_size (`int`): windows per forward pass.
    """
    runner = LayerRunner(model)
    streams = [(_Stream(batch, target), False) for batch in runner.batches(fit, batch_size)]
    if held_out is not None:
        streams += [(_Stream(batch, target), True) for batch in runner.batches(held_out, batch_size)]
    projections: dict[SiteKey, Projection] = {}
    refits: dict[SiteKey, Refit] = {}
    layers = [list(group) for _, group in groupby(sites, key=lambda site: site.layer)]
    for of_layer in progress(layers, "Reconstructing", unit="layer"):
        for stream, _ in streams:
            stream.enter(runner, of_layer)
        for place, site in enumerate(of_layer):
            if len(kept[site.key]) == site.num_units:
                continue
            columns = site.feature_mask(site.unit_mask(kept[site.key])).to(site.projection.weight.device)
            weight = site.projection.weight[:, columns]
            sums = [
                NormalEquations.empty(weight.shape[1], weight.shape[0], weight.device)
                for _ in range(1 + bool(held_out))
            ]
            for stream, is_held_out in streams:
                inputs, residual = stream.observe(runner, of_layer, place, columns, projections)
                sums[is_held_out].add(inputs, residual)
            found = refit(sums[0], sums[1] if held_out else None, ridge)
            refits[site.key] = found
            projections[site.key] = found.projection(site, kept[site.key], weight)
        for stream, _ in streams:
            stream.leave(runner, of_layer, projections)
    return projections, refits


class _Stream:
    """A batch in the pruned model and, where the target needs it, the same batch in the dense one."""

    def __init__(self, batch: Batch, target: str):
        self._pruned = batch
        self._dense = batch.copy() if target == DENSE else None
        # What the dense projections of the layer at hand write to the residual stream, site by site.
        self._wanted: list[torch.Tensor] = []
        self._next_dense: torch.Tensor | None = None

    def enter(self, runner: LayerRunner, sites: list[Site]) -> None:
        if self._dense is not None:
            with outputs_of(site.projection for site in sites) as outputs:
                self._next_dense = runner.run(sites[0].layer, self._dense)
            self._wanted = [output.view_as(self._dense.hidden) for output in outputs]

    def observe(self, runner, sites, place, columns, projections) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept inputs of a projection, and what its kept weights leave of the target: `[tokens, ...]`."""
        site = sites[place]
        before = sites[:place]
        with (
            replaced_projections(sites, projections),
            outputs_of(earlier.projection for earlier in before) as written,
            stopped_before(site.projection) as stop,
        ):
            runner.run(site.layer, self._pruned)
        inputs = self._pruned.tokens(stop.inputs)
        weight, bias = site.projection.weight, site.projection.bias
        if self._dense is None:
            return inputs[:, columns], F.linear(inputs[:, ~columns], weight[:, ~columns])
        error = self._pruned.hidden.float() - self._dense.hidden.float()
        for output, wanted in zip(written, self._wanted):
            error += output.view_as(error).float() - wanted.float()
        target = self._pruned.tokens(self._wanted[place].float() - error)
        return inputs[:, columns], target - F.linear(inputs[:, columns], weight[:, columns], bias).float()

    def leave(self, runner, sites, projections) -> None:
        with replaced_projections(sites, projections):
            self._pruned.hidden = runner.run(sites[0].layer, self._pruned)
        if self._dense is not None:
            assert self._next_dense is not None
            self._dense.hidden, self._next_dense, self._wanted = self._next_dense, None, []
