"""Reconstruction layer by layer: a projection is refitted on its inputs in a model whose earlier layers are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..forward.gates import Projection, kept_projection
from ..forward.layerwise import LayerRunner
from ..loading.offloading import resident
from ..loading.subject import Subject
from ..request.choices import ReconstructionTarget
from ..runs.progress import progress
from ..runs.shelves import Shelf
from .aims import Aims
from .experts import ExpertRefit
from .joining import Joining
from .layer_fit import LayerFit
from .least_squares import Refit
from .reconstruction import Reconstruction
from .streams import Stream


# The projections of a layer, and how they were determined.
Refitted = tuple[dict[SiteKey, Projection], dict[SiteKey, Refit | ExpertRefit]]


@dataclass(frozen=True)
class SequentialFit:
    """How projections are fitted one after the other.

    Args:
        target (`str`): `"layer"` fits the output of the unpruned projection for the same inputs. `"dense"` fits the
            residual stream of the dense model, which also corrects the errors of earlier layers. Where outputs are
            normalized before they are added to the stream, it fits the same as `"layer"`, and before a gap the output
            whose normalized value leads nearest to the dense stream after the gap.
        ridge (`float`, *optional*): the ridge for all sites; by default it is chosen per site on the held-out text.
        batch_size (`int`): number of windows per forward pass.
        refit_sources (`bool`, defaults to `False`): refit the sources of the features too, for the target `"dense"`.
            All sources are refitted so that their outputs in the pruned model are those in the dense model. Sources of
            pointwise sites are also changed by Gauss-Newton steps towards the projection's target, after which the
            projection is fitted once more. This takes about three more passes. The memory of the host holds two more
            hidden states of all windows and, for one pointwise site at a time, the inputs of its sources, their
            slopes, and the residual at all tokens in float32.
        dense_stream (`Shelf`, *optional*): storage for the dense model's hidden states that other fits to the same
            tokens share, for the target `"dense"`. Layers that the dense model has run for another fit do not run
            again.
        on_dense (`bool`, defaults to `False`): fit all layers on the hidden states of the dense model, and not on
            those of the layers that are pruned already; for the target `"layer"`.
    """

    target: str
    ridge: float | None
    batch_size: int
    refit_sources: bool = False
    dense_stream: Shelf | None = None
    on_dense: bool = False


@torch.no_grad()
def refit_in_sequence(
    subject: Subject,
    kept: Mapping[SiteKey, list[int]],
    texts: Sequence[Calibration],
    fit: SequentialFit,
    shelf: Shelf | None = None,
    done: Sequence[Reconstruction] = (),
) -> Iterator[Refitted]:
    """Yield, layer by layer, new projection parameters of every site that loses units.

    If the target is the dense model's stream, all sites after the first of these are included, since they can
    compensate for its loss. Sites without units are left out, and the target of the site before such a gap is the
    dense stream after the gap.

    With several processes, each runs a share of the windows, and all fit on the sums over all windows. The normal
    equations of one projection are in memory at a time. The memory of the host holds the hidden states of all windows,
    three times for the target `"dense"`. The time is that of about three passes over the tokens, four for `"dense"`.
    The parameters of a layer are in memory until the next layer is requested.

    Args:
        subject (`Subject`): the dense model, which is not changed, with all its sites. Its layers may be offloaded.
        kept (mapping of site key to `list[int]`): the kept units.
        texts (sequence of `Calibration`): the tokens to fit on and, if there are any, the held-out tokens.
        fit (`SequentialFit`): how projections are fitted.
        shelf (`Shelf`, *optional*): storage for hidden states. It is settled after every layer, and an interrupted
            pass resumes after the last settled layer.
        done (sequence of `Reconstruction`): the reconstructions of the first layers by an interrupted run.
    """
    sites, runner, shelf = subject.sites, LayerRunner(subject.model), shelf or Shelf()
    towards_dense = fit.target == ReconstructionTarget.DENSE
    joining = Joining.of(subject) if towards_dense else None
    aims = Aims(sites, kept, over_gaps=joining is not None)
    streams: list[list[Stream]] = [[] for _ in texts]
    follows = fit.refit_sources, fit.on_dense
    for held, text in enumerate(texts):
        if (share := text.own_share()) is not None:
            for number, batch in enumerate(runner.batches(share, fit.batch_size)):
                name = f"{held}.{number}"
                stream = Stream(name, batch, runner, shelf, joining, *follows, aims, fit.dense_stream)
                streams[held].append(stream)
    every_stream = [stream for of_text in streams for stream in of_text]
    losing = {site.key for site in sites if len(kept[site.key]) < site.num_units}
    behind = {site.key for site in sites[_first_fitted(sites, kept) :] if towards_dense or site.key in losing}
    # Projections of attention make up for no expert that is removed.
    if all(site.routing is not None for site in sites if site.key in losing):
        behind = set()
    if shelf.settled == 0:
        for stream in every_stream:
            stream.start()
        shelf.settle(0)
    # A layer may lack sublayers, and a layer without any lacks sites.
    layers = [[site for site in sites if site.layer == number] for number in range(len(runner.layers))]
    left = layers[shelf.settled :]
    first_changed = min((site.layer for site in sites if site.key in behind | losing), default=len(layers))
    for of_layer in progress(left, "Reconstructing", total=len(layers), unit="layer", initial=shelf.settled):
        number = of_layer[0].layer
        layer = LayerFit(of_layer, streams, fit.ridge, fit.refit_sources)
        with resident(runner.layers[number]):
            for ahead in range(aims.layers_run(number - 1), aims.layers_run(number)):
                if fit.dense_stream is not None and ahead < fit.dense_stream.settled:
                    continue
                with resident(runner.layers[ahead]):
                    for stream in every_stream:
                        stream.enter(layers[ahead])
                if fit.dense_stream is not None:
                    fit.dense_stream.settle(ahead + 1)
            is_done = number < len(done)
            if is_done:
                layer.projections |= done[number].placed_like(of_layer).projections
            for place, site in enumerate(of_layer):
                if not is_done and not kept[site.key]:
                    # A removed site has no output, and the sites after it compensate for its loss.
                    layer.projections[site.key] = kept_projection(site, [])
                elif not is_done and site.routing is not None:
                    layer.settle_experts(place, kept_projection(site, kept[site.key]))
                elif not is_done and site.key in behind:
                    layer.settle(place, kept_projection(site, kept[site.key]))
                for stream in every_stream:
                    stream.settle(of_layer, place)
            for stream in every_stream:
                if towards_dense and number < first_changed:
                    stream.follow_dense(number)
                else:
                    stream.leave(of_layer, layer.projections)
            yield layer.projections, layer.refits
        shelf.settle(number + 1)


def _first_fitted(sites: Sequence[Site], kept: Mapping[SiteKey, list[int]]) -> int:
    """The place of the first site that can make up for a loss: it loses units itself, or a gap follows it."""
    first = next((place for place, site in enumerate(sites) if len(kept[site.key]) < site.num_units), len(sites))
    is_gap = first < len(sites) and not kept[sites[first].key]
    return max(0, first - 1) if is_gap else first
