"""Fitting the projections of one layer, one after the other, to the streams that run through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..architectures import Site, SiteKey
from ..forward.gates import Projection, kept_sources
from ..runs.devices import back_to, compute_device, precise
from .experts import ExpertRefit, refit_experts
from .gauss_newton import LeastSquares, gauss_newton_changes, summed_squares
from .least_squares import NormalEquations, Refit, refit
from .streams import Stream


# The parts of a Gauss-Newton step that are tried. The whole step suits activations with little curvature.
PARTS = (1.0, 0.5, 0.25)


@dataclass
class LayerFit:
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
        # Features that are bent next are not stored, and the memory is needed for it.
        fitted = self._fit(place, keeps=not site.pointwise)
        if site.pointwise and len(self.streams) > 1 and self._bend_features(place):
            fitted = fitted.followed_by(self._fit(place))
        return replace(fitted, sources=bool(self.projections[site.key].sources))

    def _fit(self, place: int, keeps: bool = True) -> Refit:
        """Fit the projection to the difference between its target and its output."""
        site = self.sites[place]
        now = self.projections[site.key]
        kept = self._kept_streams(place) if keeps else set()
        fitted = self._solved(
            site,
            now.weight.shape,
            lambda stream: stream.observe(self.sites, place, self.projections, keeps=stream.name in kept),
        )
        self.projections[site.key] = fitted.projection(now)
        return fitted

    def _kept_streams(self, place: int) -> set[str]:
        """Return the names of the streams whose features are stored for the rest of the layer.

        Those of the last site are the largest, and only one more run uses them. They may take the memory that the
        stream before that site has left, and are computed once more for the other windows.
        """
        names = [stream.name for streams in self.streams for stream in streams]
        if place + 1 == len(self.sites):
            site = self.sites[place]
            width, features = self.projections[site.key].weight.shape
            # An accelerator computes them faster than it copies them to the host.
            on_cpu = compute_device(site.output).type == "cpu"
            names = names[: int(len(names) * min(1.0, width / max(1, features)))] if on_cpu else []
        return set(names)

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
