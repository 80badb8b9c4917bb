"""Least squares for every site independently, from Gram matrices of its inputs in the dense model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..forward.evidence import Evidence, Grams
from ..forward.gates import Projection, kept_projection
from ..forward.gathering import collect_statistics, gather_statistics, statistics_by_layer
from ..forward.statistics import (
    GRAM,
    SiteStatistics,
)
from ..loading.offloading import is_offloaded
from ..loading.subject import Subject
from ..request.config import PruningConfig
from ..runs.devices import compute_device
from ..runs.progress import progress
from ..runs.resume import Resume
from ..runs.shelves import Shelf
from .experts import ExpertRefit
from .gaps import gap_sums, gaps_of
from .least_squares import NormalEquations, Refit, refit
from .sequential import (
    Refitted,
)


# Gram matrices of all sites are collected with the statistics of scores if they take at most this much memory.
GRAM_BYTES = 2 * 2**30

# One in this many calibration windows is held out for choosing ridges.
HELD_OUT_EVERY = 8


def refit_independently(
    subject: Subject, kept: Mapping[SiteKey, list[int]], config: PruningConfig, evidence: Evidence, shelf: Shelf
) -> Iterator[Refitted]:
    """Refit every site that loses units on its inputs in the dense model, layer by layer.

    A site directly before removed sites also takes over what they add to the residual stream.

    Args:
        subject (`Subject`): the dense model, which is not changed, with all its sites.
        kept (mapping of site key to `list[int]`): the kept units.
        config (`PruningConfig`): the request, for `ridge` and `batch_size`.
        evidence (`Evidence`): the tokens, and the Gram matrices if they were collected before.
        shelf (`Shelf`): storage for hidden states; see [`statistics_by_layer`].
    """
    assert evidence.calibration is not None
    grams, total = evidence.grams, len(subject.layers)
    texts = fit_and_held_out(evidence.calibration)
    gaps = gaps_of(subject.sites, kept) if takes_over(subject) else {}
    sums = gap_sums(subject, gaps, texts, config.batch_size) if gaps else []
    subject = subject.looking_at(
        site for site in subject.sites if 0 < len(kept[site.key]) < site.num_units or site.key in gaps
    )
    measured: Iterable
    if not all(site.key in grams for site in subject.sites):
        # They were collected for a request that refits fewer sites.
        grams = {}
    if grams:
        by_layer = [[site for site in subject.sites if site.layer == number] for number in range(total)]
        measured = ((of_layer, grams) for of_layer in by_layer)
    else:
        measured = statistics_by_layer(subject, texts, config.batch_size, (GRAM,), shelf)
    for of_layer, of_texts in progress(measured, "Reconstructing", total=total, unit="layer"):
        projections: dict[SiteKey, Projection] = {}
        refits: dict[SiteKey, Refit | ExpertRefit] = {}
        for site in of_layer:
            weight, columns = site.projection.weight, site.kept_features(kept[site.key])
            # New statistics are removed from their mapping, so that Gram matrices are freed after their use.
            statistics = grams[site.key] if grams else [of_text.pop(site.key) for of_text in of_texts]
            statistics = [of_text.to(weight.device) for of_text in statistics]
            equations = [
                NormalEquations.of_removed(_gram(of_text), of_text.count, weight, columns) for of_text in statistics
            ]
            if site.key in gaps:
                equations = [
                    of_text.pop(site.key).joined(own, weight, columns) for of_text, own in zip(sums, equations)
                ]
            fitted = refit(equations[0], equations[1] if len(equations) > 1 else None, config.ridge)
            refits[site.key] = fitted
            projections[site.key] = fitted.projection(kept_projection(site, kept[site.key]))
        yield projections, refits


def takes_over(subject: Subject) -> bool:
    """Return whether a projection can take over the output of removed sites after it: whether the outputs of
    projections are added to the residual stream, with norms of their own or all times the same number."""
    return subject.architecture.layout.residual_adds_up(subject.text_config)


def fit_and_held_out(calibration: Calibration) -> list[Calibration]:
    """Return the windows to fit on and, if there are any, the held-out windows."""
    return [text for text in calibration.split(HELD_OUT_EVERY) if text is not None]


def statistics_with_grams(
    subject: Subject,
    calibration: Calibration,
    batch_size: int,
    kinds: Iterable[str],
    refitted: Iterable[Site],
    resume: Resume | None = None,
) -> tuple[dict[SiteKey, SiteStatistics], Grams]:
    """Collect statistics for scores and, in the same pass, Gram matrices for independent least squares.

    There are no Gram matrices if the model does not fit into memory, for which they are collected layer by layer.

    Args:
        subject (`Subject`): the dense model with the sites to measure.
        calibration (`Calibration`): the tokens.
        batch_size (`int`): number of windows per forward pass.
        kinds (iterable of `str`): the statistics that the scores need.
        refitted (iterable of `Site`): the sites that have Gram matrices; the others are not refitted.
        resume (`Resume`, *optional*): where the sums so far are stored.
    """
    texts = fit_and_held_out(calibration)
    if is_offloaded(subject.model):
        grams, parts = set(), gather_statistics(subject, texts, batch_size, kinds, resume)
    else:
        grams = {site.key for site in refitted}
        parts = [collect_statistics(subject, text, batch_size, {*kinds, GRAM}, resume, grams) for text in texts]
    by_site = {site.key: [part[site.key] for part in parts] for site in subject.sites}
    statistics = {key: functools.reduce(SiteStatistics.with_more, of_site) for key, of_site in by_site.items()}
    return statistics, {key: by_site[key] for key in by_site if key in grams}


def grams_fit(sites: Iterable[Site]) -> bool:
    """Return whether memory may hold the Gram matrices of all sites, on fitted and held-out windows."""
    return sum(2 * 4 * site.projection.in_features**2 for site in sites) <= GRAM_BYTES


def gram_statistics(
    subject: Subject, texts: Sequence[Calibration], batch_size: int
) -> Iterator[tuple[Site, list[SiteStatistics]]]:
    """Yield every site with its Gram matrix for every text, in one pass. Memory holds those of one layer at a time.

    Args:
        subject (`Subject`): the dense model with the sites to measure, layer by layer.
        texts (sequence of `Calibration`): the tokens.
        batch_size (`int`): number of windows per forward pass.
    """
    for of_layer, of_texts in statistics_by_layer(subject, texts, batch_size, (GRAM,)):
        for site in of_layer:
            # Statistics are removed from their mapping, so that Gram matrices are freed after their use.
            yield site, [of_text.pop(site.key).to(compute_device(site.projection)) for of_text in of_texts]


def _gram(statistics: SiteStatistics) -> torch.Tensor:
    assert statistics.gram is not None
    return statistics.gram
