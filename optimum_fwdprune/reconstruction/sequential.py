"""Reconstruction layer by layer: a projection is refitted on its inputs in a model whose earlier layers are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..forward.gates import Projection, kept_projection, kept_sources
from ..forward.layerwise import LayerRunner
from ..loading.offloading import resident
from ..loading.subject import Subject
from ..request.choices import ReconstructionTarget
from ..runs.devices import back_to, precise
from ..runs.progress import progress
from ..runs.shelves import Shelf
from .aims import Aims
from .experts import ExpertRefit, refit_experts
from .gauss_newton import LeastSquares, gauss_newton_changes, summed_squares
from .joining import Joining
from .least_squares import NormalEquations, Refit, refit
from .reconstruction import Reconstruction
from .streams import Stream


# The parts of a Gauss-Newton step that are tried. The whole step suits activations with little curvature.
PARTS = (1.0, 0.5, 0.25)

# The projections of a layer, and how they were determined.
Refitted = tuple[dict[SiteKey, Projection], dict[SiteKey, Refit | ExpertRefit]]


@dataclass(frozen=True)
class SequentialFit:
    """How projections are fitted one after the other.

    Args:
        target (`str`): `"layer"` fits the output of the unpruned projection for the same inputs. `"dense"` fits the
            residual stream of the dense model, which also corrects the errors of earlier layers; where outputs are
            normalized before they are added to the stream, it fits the output of the projection in the dense model,
            and before a gap the output whose normalized value leads nearest to the dense stream after the gap.
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
    for of_layer in progress(left, "Reconstructing", total=len(layers), unit="layer", initial=shelf.settled):
        number = of_layer[0].layer
        layer = _Layer(of_layer, streams, fit.ridge, fit.refit_sources)
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
                stream.leave(of_layer, layer.projections)
            yield layer.projections, layer.refits
        shelf.settle(number + 1)


def _first_fitted(sites: Sequence[Site], kept: Mapping[SiteKey, list[int]]) -> int:
    """The place of the first site that can make up for a loss: it loses units itself, or a gap follows it."""
    first = next((place for place, site in enumerate(sites) if len(kept[site.key]) < site.num_units), len(sites))
    is_gap = first < len(sites) and not kept[sites[first].key]
    return max(0, first - 1) if is_gap else first


@dataclass
class _Layer:
    """The sites of a layer, with their new projections.

    Args:
        sites (sequence of `Site`): the sites, in the order in which they write to the residual stream.
        streams (sequence of lists of `Stream`): the streams of the tokens to fit on and, if there are any, of the
            held-out tokens.
        ridge (`float`, *optional*): the ridge for all sites.
        refit_sources (`bool`): whether sources are refitted too.
    """

    sites: Sequence[Site]
    streams: Sequence[Sequence[Stream]]
    ridge: float | None
    refit_sources: bool
    projections: dict[SiteKey, Projection] = field(default_factory=dict)
    refits: dict[SiteKey, Refit | ExpertRefit] = field(default_factory=dict)

    def settle_experts(self, place: int, projection: Projection) -> None:
        """Fit the output projections of the kept experts of a mixture, if it loses any."""
        site = self.sites[place]
        self.projections[site.key] = projection
        if len(projection.kept) < site.num_units:
            texts = [
                [stream.observe_experts(self.sites, place, self.projections) for stream in streams]
                for streams in self.streams
            ]
            self.projections[site.key], self.refits[site.key] = refit_experts(site, projection.kept, texts, self.ridge)

    def settle(self, place: int, projection: Projection) -> None:
        """Fit the parameters of a site, starting from those of `projection`."""
        site = self.sites[place]
        self.projections[site.key] = projection
        self.refits[site.key] = self._fit_all(place) if self.refit_sources else self._fit(place)

    def _fit_all(self, place: int) -> Refit:
        """Fit the projection and its sources."""
        site = self.sites[place]
        self._correct_inputs(place)
        fitted = self._fit(place)
        if site.pointwise and len(self.streams) > 1 and self._bend_features(place):
            fitted = fitted.followed_by(self._fit(place))
        return replace(fitted, sources=bool(self.projections[site.key].sources))

    def _fit(self, place: int) -> Refit:
        """Fit the projection to the difference between its target and its output."""
        site = self.sites[place]
        now = self.projections[site.key]
        fitted = self._solved(
            site, now.weight.shape, lambda stream: stream.observe(self.sites, place, self.projections, keeps=True)
        )
        self.projections[site.key] = fitted.projection(now)
        return fitted

    def _correct_inputs(self, place: int) -> None:
        """Change the sources so that they read (I + D) x instead of x, the best linear prediction of their inputs in
        the dense model from their inputs x in the pruned model."""
        site = self.sites[place]
        now = self.projections[site.key]
        width = site.sources[0].linear.in_features
        change = self._solved(
            site, (width, width), lambda stream: stream.read(self.sites, place, self.projections)
        ).change
        if change is None or not change.any():
            return
        sources = kept_sources(site, now.kept)
        for name, weight in _weights(sources):
            sources[name] = back_to(precise(weight) + precise(weight) @ change, weight)
        self.projections[site.key] = replace(now, sources=sources)

    def _solved(self, site: Site, shape: Sequence[int], observe: Callable[[Stream], tuple]) -> Refit:
        """Solve least squares for a matrix `[outputs, inputs]` over the inputs and residuals that `observe` returns
        for every stream."""
        outputs, inputs = shape
        sums = [NormalEquations.empty(inputs, outputs, site.projection.weight.device) for _ in self.streams]
        for total, streams in zip(sums, self.streams):
            for stream in streams:
                total.add(*observe(stream))
        sums = [equations.pooled() for equations in sums]
        if not (sums[0].gram.isfinite().all() and sums[0].cross.isfinite().all()):
            raise ValueError(
                f"The activations before {site.output_name} ({site}) contain NaN or infinity once the layers "
                f"before it are pruned. Load a float16 model that overflows in bfloat16 or float32."
            )
        return refit(sums[0], sums[1] if len(sums) > 1 else None, self.ridge)

    def _bend_features(self, place: int) -> bool:
        """Change the sources of a pointwise site towards its target, and return whether the error on held-out tokens
        falls."""
        site = self.sites[place]
        best = now = self.projections[site.key]
        sources = dict(now.sources) or kept_sources(site, now.kept)
        changes, lowest = self._changes_and_error(place, sources)
        if changes is None:
            return False
        weights = _weights(sources)
        rows = changes.flatten(0, 1).split([len(weight) for _, weight in weights])
        for part in PARTS:
            moved = {
                name: (weight.float() + part * change).to(weight.dtype)
                for (name, weight), change in zip(weights, rows)
            }
            candidate = replace(now, sources=sources | moved)
            left = self._left(place, candidate)
            if left < lowest:
                best, lowest = candidate, left
        self.projections[site.key] = best
        return best is not now

    def _changes_and_error(self, place: int, sources: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, float]:
        """Return Gauss-Newton changes of the sources' weights, and the error on held-out tokens without them, a sum of
        squares. The linearized tokens are freed on return."""
        weight = self.projections[self.sites[place].key].weight.float()
        rows = sum(len(weight_of_source) for _, weight_of_source in _weights(sources))
        shape = (rows // weight.shape[1], weight.shape[1], self.sites[place].sources[0].linear.in_features)
        fit, held_out = (
            LeastSquares([stream.linearize(self.sites, place, self.projections) for stream in streams], weight, shape)
            for streams in self.streams
        )
        return gauss_newton_changes(fit, held_out)

    def _left(self, place: int, candidate: Projection) -> float:
        """Return the error of a candidate on held-out tokens, a sum of squares."""
        projections = {**self.projections, self.sites[place].key: candidate}
        return summed_squares(stream.observe(self.sites, place, projections)[1] for stream in self.streams[1])


def _weights(sources: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Return the weights among the parameters of sources, without biases."""
    return [(name, value) for name, value in sources.items() if value.dim() == 2]
