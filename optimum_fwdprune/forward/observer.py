"""Observing the sites of a model in forward passes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..architectures import Site, SiteKey
from ..runs import ranks
from ..runs.devices import compute_device
from .accumulators import Accumulator, SquareSums
from .routing import contributions
from .statistics import GRAM, SOURCE_NORMS, SiteStatistics


class Observer:
    """Collects statistics of sites in forward passes of a model, or of some of its layers.

    Args:
        sites (iterable of `Site`): the sites.
        kinds (iterable of `str`): the statistics to collect, of `KINDS_OF_STATISTICS`.
        with_gram (collection of site keys, *optional*): the sites whose Gram matrices are collected if these are
            among `kinds`; by default all.

    Attributes:
        attention_mask (`Tensor[windows, tokens]`, *optional*): mask of the next batch; 0 where a token is padding.
    """

    def __init__(self, sites: Iterable[Site], kinds: Iterable[str], with_gram: Collection[SiteKey] | None = None):
        self._sites, kinds = list(sites), set(kinds)
        self._accumulators = {
            site.key: _accumulator(site, GRAM in kinds and (with_gram is None or site.key in with_gram))
            for site in self._sites
        }
        # How many tokens are routed to every expert.
        self._routed = {
            site.key: torch.zeros_like(self._accumulators[site.key].sum)
            for site in self._sites
            if site.routing is not None
        }
        self._sources = {
            coupling.name: (coupling.linear, SquareSums(coupling.linear))
            for site in self._sites
            for coupling in site.couplings
            if SOURCE_NORMS in kinds and coupling.is_linear and coupling.axis == 0
        }
        self.attention_mask: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect statistics of all forward passes within the context."""
        watched: list[tuple[nn.Module, Any]] = []
        for site in self._sites:
            if site.routing is None:
                watched.append((site.projection, self._adds_to(self._accumulators[site.key])))
            else:
                watched.append((site.routing.experts, self._adds_experts(site)))
        watched += [(linear, self._adds_to(squares)) for linear, squares in self._sources.values()]
        with _pre_hooks(watched):
            yield

    def _adds_to(self, sums: Accumulator | SquareSums):
        def hook(_module, args):
            inputs = args[0].flatten(0, -2)
            if self.attention_mask is not None:
                inputs = inputs[self.attention_mask.bool().flatten().to(inputs.device)]
            sums.add(inputs)

        return hook

    def _adds_experts(self, site: Site):
        def hook(experts, args):
            hidden, indices, weights = args[:3]
            if self.attention_mask is not None:
                is_token = self.attention_mask.bool().flatten().to(hidden.device)
                hidden, indices, weights = hidden[is_token], indices[is_token], weights[is_token]
            self._accumulators[site.key].add(contributions(experts, hidden, indices, weights, site.num_units))
            self._routed[site.key] += indices.flatten().bincount(minlength=site.num_units).to(self._routed[site.key])

        return hook

    def sums(self) -> dict[str, torch.Tensor]:
        """Return the sums so far, for [`take_up`]."""
        sums = {f"routed.{key}": routed for key, routed in self._routed.items()}
        sums |= {f"squares.{name}": squares.squares for name, (_, squares) in self._sources.items()}
        for key, accumulator in self._accumulators.items():
            sums |= {f"{key}.{name}": value for name, value in accumulator.state().items()}
        return sums

    def take_up(self, sums: dict[str, torch.Tensor], numbers: dict[str, Any]) -> int:
        """Resume from `sums` that were collected before, and return the number of their windows."""
        for name, (_, squares) in self._sources.items():
            squares.squares.copy_(sums[f"squares.{name}"])
        for key, routed in self._routed.items():
            routed.copy_(sums[f"routed.{key}"])
        for key, accumulator in self._accumulators.items():
            prefix = f"{key}."
            own = {name.removeprefix(prefix): value for name, value in sums.items() if name.startswith(prefix)}
            accumulator.take_up(own)
        return numbers["windows"]

    def pool(self) -> None:
        """Combine the sums of all processes of a run, which have collected them on different windows."""
        if ranks.world_size() > 1:
            for accumulator in self._accumulators.values():
                accumulator.pool()
            for _, squares in self._sources.values():
                squares.pool()
            self._routed = {key: ranks.summed(routed) for key, routed in self._routed.items()}

    def statistics(self) -> dict[SiteKey, SiteStatistics]:
        """Return the statistics of every site.

        Raises:
            ValueError: where a projection was bypassed, or its inputs contain NaN or infinity.
        """
        statistics = {}
        for site in self._sites:
            check_called(site, self._accumulators[site.key].count)
            result = self._accumulators[site.key].result()
            if not (result.mean.isfinite().all() and result.variance.isfinite().all()):
                raise ValueError(
                    f"The activations before {site.output_name} ({site}) contain NaN or infinity. Check the "
                    f"weights up to this layer, or load a float16 model that overflows in bfloat16 or float32."
                )
            if site.key in self._routed:
                result.routed = self._routed[site.key].float().to(result.mean.device)
            names = [coupling.name for coupling in site.couplings if coupling.name in self._sources]
            result.source_norms = {name: self._sources[name][1].norm() for name in names}
            statistics[site.key] = result
        return statistics


def _accumulator(site: Site, with_gram: bool) -> Accumulator:
    if site.routing is not None:
        return Accumulator(site.num_units, compute_device(site.routing.experts))
    return Accumulator(site.projection.in_features, compute_device(site.projection), with_gram)


@contextmanager
def _pre_hooks(pairs: Iterable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_called(site: Site, calls: int) -> None:
    """Raise `ValueError` where the number of calls of the projection of `site` is 0."""
    if calls == 0:
        raise ValueError(
            f"The forward pass never called {site.output_name}, so that the {site} cannot be measured or cut. A "
            f"fused implementation of attention may bypass it. Load the model with its plain implementation."
        )
