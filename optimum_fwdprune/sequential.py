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
    """Return new projection parameters, first layer to last: of every site that loses units and, where the target is
    the dense model's stream, of every site behind the first of these, since all of them can make up for its loss.

    One projection's normal equations are in memory at a time, and the hidden states of all windows: three times for
    the target `"dense"`. It costs about three passes of the layers over the tokens, four for `"dense"`.

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
    lost = False
    layers = [list(group) for _, group in groupby(sites, key=lambda site: site.layer)]
    for of_layer in progress(layers, "Reconstructing", unit="layer"):
        for stream, _ in streams:
            stream.enter(runner, of_layer)
        for place, site in enumerate(of_layer):
            lost = lost or len(kept[site.key]) < site.num_units
            if not lost or (target == LAYER and len(kept[site.key]) == site.num_units):
                continue
            columns = site.kept_features(kept[site.key])
            weight = site.projection.weight[:, columns]
            sums = [
                NormalEquations.empty(weight.shape[1], weight.shape[0], weight.device)
                for _ in range(1 + bool(held_out))
            ]
            for stream, is_held_out in streams:
                inputs, residual = stream.observe(runner, of_layer, place, columns, projections)
                sums[is_held_out].add(inputs, residual)
            if not (sums[0].gram.isfinite().all() and sums[0].cross.isfinite().all()):
                raise ValueError(
                    f"The activations before {site.projection_name} ({site}) contain NaN or infinity once the layers "
                    f"before it are pruned. A float16 model that overflows runs in bfloat16 or float32."
                )
            found = refit(sums[0], sums[1] if held_out else None, ridge)
            refits[site.key] = found
            projections[site.key] = found.projection(site, kept[site.key], weight)
        for stream, _ in streams:
            stream.leave(runner, of_layer, projections)
    return projections, refits


class _Stream:
    """A batch in the pruned model and, where the target needs it, the residual stream of the dense one."""

    def __init__(self, batch: Batch, target: str):
        self._batch = batch
        self._pruned = batch.hidden
        # Of the dense model: in front of the layer at hand and then behind each of its sites that are still to come.
        self._dense = [batch.hidden] if target == DENSE else []

    def enter(self, runner: LayerRunner, sites: list[Site]) -> None:
        if not self._dense:
            return
        self._batch.hidden = stream = self._dense.pop()
        with outputs_of(site.projection for site in sites) as outputs:
            after = runner.run(sites[0].layer, self._batch)
        for output in outputs[:-1]:
            stream = stream + output.view_as(stream).to(stream.device)
            self._dense.append(stream)
        self._dense.append(after)

    def observe(self, runner, sites, place, columns, projections) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept inputs of a projection, and what its kept weights leave of the target: `[tokens, ...]`."""
        site = sites[place]
        self._batch.hidden = self._pruned
        with (
            replaced_projections(sites, projections),
            outputs_of(earlier.projection for earlier in sites[:place]) as written,
            stopped_before(site.projection) as stop,
        ):
            runner.run(site.layer, self._batch)
        inputs = self._batch.tokens(stop.inputs)
        weight, bias = site.projection.weight, site.projection.bias
        if not self._dense:
            return inputs[:, columns], F.linear(inputs[:, ~columns], weight[:, ~columns])
        device = weight.device
        target = self._dense[place].to(device).float() - self._pruned.to(device).float()
        for output in written:
            target -= output.view_as(target).to(device).float()
        said = F.linear(inputs[:, columns], weight[:, columns], bias)
        return inputs[:, columns], self._batch.tokens(target) - said.float()

    def leave(self, runner, sites, projections) -> None:
        self._batch.hidden = self._pruned
        with replaced_projections(sites, projections):
            self._pruned = runner.run(sites[0].layer, self._batch)
        # What the next layer starts from.
        self._dense = self._dense[-1:]
