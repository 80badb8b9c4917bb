"""Reconstruction layer by layer: every projection is refitted on what the layers pruned before it make of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .architectures import Site, SiteKey
from .calibration import Calibration
from .gates import Projection, replaced_projections
from .layerwise import Batch, LayerRunner, outputs_of, stopped_before
from .least_squares import NormalEquations, Refit, refit
from .offloading import resident
from .shelves import Shelf
from .utils import progress


LAYER, DENSE = "layer", "dense"

# Projections of one layer, and how each was settled.
Refitted = tuple[dict[SiteKey, Projection], dict[SiteKey, Refit]]


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
    shelf: Shelf | None = None,
    known: Sequence[Mapping[SiteKey, Projection]] = (),
) -> Iterator[Refitted]:
    """Yield, layer by layer, new projection parameters of every site that loses units and, where the target is the
    dense model's stream, of every site behind the first of these, since all of them can make up for its loss.

    With several processes each carries a share of the windows along, and all fit alike on the sums over all of them.
    One projection's normal equations are in memory at a time, and the hidden states of all windows: three times for
    the target `"dense"`. It costs about three passes of the layers over the tokens, four for `"dense"`. A layer's
    parameters are in memory while its projections are out.

    Args:
        model (`PreTrainedModel`): the dense model; it is not changed. Its layers may be offloaded.
        sites (sequence of `Site`): its sites, in the order in which they write to the residual stream.
        kept (mapping of site key to `list[int]`): units that stay.
        target (`str`): `"layer"` fits what the whole projection makes of these inputs, `"dense"` what would undo the
            error that the residual stream has gathered so far as well.
        ridge (`float`, *optional*): for all sites; by default chosen per site on `held_out`.
        fit, held_out (`Calibration`, the second *optional*): the tokens.
        batch_size (`int`): windows per forward pass.
        shelf (`Shelf`, *optional*): where hidden states wait; it settles after every layer, and a pass that was
            interrupted goes on behind the last layer that it settled.
        known (sequence of mappings of site key to `Projection`): what was found for the first layers before.
    """
    runner, shelf = LayerRunner(model), shelf or Shelf()
    texts = [text for text in (fit, held_out) if text is not None]
    streams = [
        (_Stream(f"{held}.{number}", batch, runner, shelf, target == DENSE), held)
        for held, text in enumerate(texts)
        if (share := text.own_share()) is not None
        for number, batch in enumerate(runner.batches(share, batch_size))
    ]
    first_loss = next((place for place, site in enumerate(sites) if len(kept[site.key]) < site.num_units), len(sites))
    behind = {site.key for site in sites[first_loss:]}
    if shelf.settled == 0:
        for stream, _ in streams:
            stream.start()
        shelf.settle(0)
    layers = [list(group) for _, group in groupby(sites, key=lambda site: site.layer)]
    for of_layer in progress(layers[shelf.settled :], "Reconstructing", unit="layer"):
        projections: dict[SiteKey, Projection] = {}
        refits: dict[SiteKey, Refit] = {}
        with resident(runner.layers[of_layer[0].layer]):
            for stream, _ in streams:
                stream.enter(of_layer)
            is_known = of_layer[0].layer < len(known)
            if is_known:
                projections |= known[of_layer[0].layer]
            for place, site in enumerate([] if is_known else of_layer):
                if site.key not in behind or (target == LAYER and len(kept[site.key]) == site.num_units):
                    continue
                columns = site.kept_features(kept[site.key])
                weight = site.projection.weight[:, columns]
                sums = [NormalEquations.empty(weight.shape[1], weight.shape[0], weight.device) for _ in texts]
                for stream, held in streams:
                    sums[held].add(*stream.observe(of_layer, place, columns, projections))
                sums = [each.pooled() for each in sums]
                if not (sums[0].gram.isfinite().all() and sums[0].cross.isfinite().all()):
                    raise ValueError(
                        f"The activations before {site.projection_name} ({site}) contain NaN or infinity once the "
                        f"layers before it are pruned. A float16 model that overflows runs in bfloat16 or float32."
                    )
                found = refit(sums[0], sums[1] if held_out else None, ridge)
                refits[site.key] = found
                projections[site.key] = found.projection(site, kept[site.key], weight)
            for stream, _ in streams:
                stream.leave(of_layer, projections)
            yield projections, refits
        shelf.settle(of_layer[0].layer + 1)


@dataclass(frozen=True)
class _Stream:
    """A batch in the pruned model and, where the target needs it, the residual stream of the dense one.

    On the shelf are, in front of layer number `l`: `"<l>.<name>.pruned"` and `"<l>.<name>.dense"`; and of the dense
    model within the layer at hand, `"<name>.<place>"`: what its stream is in front of the layer (0) and behind each of
    its sites.
    """

    name: str
    batch: Batch
    runner: LayerRunner
    shelf: Shelf
    follows_dense: bool

    def start(self) -> None:
        embedded = self.runner.embed(self.batch)
        self.shelf[f"0.{self.name}.pruned"] = embedded
        if self.follows_dense:
            self.shelf[f"0.{self.name}.dense"] = embedded

    def enter(self, sites: list[Site]) -> None:
        if not self.follows_dense:
            return
        layer = sites[0].layer
        stream = self.shelf.pop(f"{layer}.{self.name}.dense")
        with outputs_of(site.projection for site in sites) as outputs:
            after = self.runner.run(layer, self.batch, stream)
        for place, output in enumerate(outputs[:-1], start=1):
            stream = stream + output.view_as(stream).to(stream.device)
            self.shelf[f"{self.name}.{place}"] = stream
        self.shelf[f"{layer + 1}.{self.name}.dense"] = after

    def observe(self, sites, place, columns, projections) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept inputs of a projection, and what its kept weights leave of the target: `[tokens, ...]`."""
        site = sites[place]
        pruned = self.shelf[f"{site.layer}.{self.name}.pruned"]
        with (
            replaced_projections(sites, projections),
            outputs_of(earlier.projection for earlier in sites[:place]) as written,
            stopped_before(site.projection) as stop,
        ):
            self.runner.run(site.layer, self.batch, pruned)
        inputs = self.batch.tokens(stop.inputs)
        weight, bias = site.projection.weight, site.projection.bias
        if not self.follows_dense:
            return inputs[:, columns], F.linear(inputs[:, ~columns], weight[:, ~columns])
        device = weight.device
        target = self._dense_behind(sites, place).to(device).float() - pruned.to(device).float()
        for output in written:
            target -= output.view_as(target).to(device).float()
        said = F.linear(inputs[:, columns], weight[:, columns], bias)
        return inputs[:, columns], self.batch.tokens(target) - said.float()

    def _dense_behind(self, sites, place) -> torch.Tensor:
        last = place == len(sites) - 1
        return self.shelf[f"{sites[0].layer + 1}.{self.name}.dense" if last else f"{self.name}.{place + 1}"]

    def leave(self, sites, projections) -> None:
        layer = sites[0].layer
        pruned = self.shelf.pop(f"{layer}.{self.name}.pruned")
        with replaced_projections(sites, projections):
            self.shelf[f"{layer + 1}.{self.name}.pruned"] = self.runner.run(layer, self.batch, pruned)
        if self.follows_dense:
            for place in range(1, len(sites)):
                self.shelf.pop(f"{self.name}.{place}")
