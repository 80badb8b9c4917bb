"""Least squares for every site by itself, on what goes into it in the dense model: Gram matrices."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..forward.gates import kept_projection
from ..forward.gathering import gather_statistics, statistics_by_layer
from ..forward.layerwise import decoder_layers
from ..forward.statistics import (
    GRAM,
    SiteStatistics,
)
from ..loading.offloading import is_offloaded
from ..request.config import PruningConfig
from ..runs.devices import compute_device
from ..runs.progress import progress
from ..runs.resume import Resume
from ..runs.shelves import Shelf
from .least_squares import NormalEquations, refit
from .sequential import (
    Refitted,
)


# Gram matrices that may be held at the same time, so that they come along with the statistics of scores.
GRAM_BYTES = 2 * 2**30


# Statistics with Gram matrices of every site: on the tokens to fit and on those held out.
Grams = dict[SiteKey, list[SiteStatistics]]


# Every so many calibration windows one is held out, to choose ridges on.
HELD_OUT_EVERY = 8


def refit_independently(
    model: PreTrainedModel,
    sites: list[Site],
    kept: Mapping[SiteKey, list[int]],
    config: PruningConfig,
    texts: tuple[Calibration, Calibration | None],
    grams: Grams | None,
    shelf: Shelf,
) -> Iterator[Refitted]:
    """Refit every site on what goes into it in the dense model, layer by layer."""
    present = [text for text in texts if text is not None]
    measured: Iterable = statistics_by_layer(model, sites, present, config.batch_size, (GRAM,), shelf)
    layers = decoder_layers(model)
    if grams:
        by_layer = [[site for site in sites if site.layer == number] for number in range(len(layers))]
        measured = ((of_layer, grams) for of_layer in by_layer)
    for of_layer, found in progress(measured, "Reconstructing", total=len(layers), unit="layer"):
        projections, refits = {}, {}
        for site in of_layer:
            weight, columns = site.projection.weight, site.kept_features(kept[site.key])
            # What was just measured is taken out, so that a matrix is freed once it was used.
            statistics = grams[site.key] if grams else [each.pop(site.key) for each in found]
            statistics = [each.to(weight.device) for each in statistics]
            equations = [NormalEquations.of_removed(_gram(each), each.count, weight, columns) for each in statistics]
            refits[site.key] = refit(equations[0], equations[1] if len(equations) > 1 else None, config.ridge)
            projections[site.key] = refits[site.key].projection(kept_projection(site, kept[site.key]))
        yield projections, refits


def statistics_with_grams(
    model: PreTrainedModel,
    sites: Sequence[Site],
    calibration: Calibration,
    batch_size: int,
    kinds: Iterable[str],
    resume: Resume | None = None,
) -> tuple[dict[SiteKey, SiteStatistics], Grams]:
    """Gather what scores need and, in the same pass, what independent least squares will; not the latter where the
    model does not fit into memory, whose Gram matrices come layer by layer.

    Args:
        model (`PreTrainedModel`): the dense model.
        sites (sequence of `Site`): all its sites.
        calibration (`Calibration`): the tokens.
        batch_size (`int`): windows per forward pass.
        kinds (iterable of `str`): of statistics that the scores need.
        resume (`Resume`, *optional*): where the sums so far are kept.
    """
    texts = [text for text in calibration.split(HELD_OUT_EVERY) if text is not None]
    with_grams = not is_offloaded(model)
    parts = gather_statistics(model, sites, texts, batch_size, {*kinds, GRAM} if with_grams else kinds, resume)
    found = {site.key: [part[site.key] for part in parts] for site in sites}
    statistics = {key: functools.reduce(SiteStatistics.with_more, of_site) for key, of_site in found.items()}
    return statistics, found if with_grams else {}


def grams_fit(sites: Iterable[Site]) -> bool:
    """Whether the Gram matrices of all sites, of both texts, can be held at the same time."""
    return sum(2 * 4 * site.projection.in_features**2 for site in sites) <= GRAM_BYTES


def gram_statistics(
    model: PreTrainedModel, sites: Iterable[Site], texts: Sequence[Calibration | None], batch_size: int
) -> Iterator[tuple[Site, list[SiteStatistics]]]:
    """Yield every site with its Gram matrix on each of the texts that there are, in one pass, a layer's at a time.

    Args:
        model (`PreTrainedModel`): the dense model.
        sites (iterable of `Site`): whose, layer by layer.
        texts (sequence of `Calibration`): the tokens; `None` is left out.
        batch_size (`int`): windows per forward pass.
    """
    present = [text for text in texts if text is not None]
    for of_layer, found in statistics_by_layer(model, sites, present, batch_size, (GRAM,)):
        for site in of_layer:
            # Taken out, so that a matrix is freed once it was used.
            yield site, [each.pop(site.key).to(compute_device(site.projection)) for each in found]


def _gram(statistics: SiteStatistics) -> torch.Tensor:
    assert statistics.gram is not None
    return statistics.gram
