"""Reconstruction of projections layer by layer, by biases or by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import Site, SiteKey, get_architecture
from ..data.calibration import Calibration
from ..forward.evidence import Evidence
from ..forward.gathering import gather_statistics
from ..forward.statistics import (
    MOMENTS,
    PlacedStatistics,
)
from ..loading.offloading import resident
from ..loading.subject import Subject
from ..request.choices import ReconstructionKind, ReconstructionOrder, ReconstructionTarget
from ..request.config import PruningConfig
from ..runs.loggers import get_logger
from ..runs.shelves import Shelf
from .bias import compensate_bias
from .independent import fit_and_held_out, refit_independently, takes_over
from .reconstruction import Reconstruction
from .sequential import (
    Refitted,
    SequentialFit,
    refit_in_sequence,
)


logger = get_logger(__name__)


def check_reconstruction(model: PreTrainedModel, config: PruningConfig) -> None:
    """Raise `ValueError` where `model` does not allow the reconstruction of the request."""
    least_squares = config.reconstruction == ReconstructionKind.LEAST_SQUARES
    sequential = least_squares and config.reconstruction_order != ReconstructionOrder.INDEPENDENT
    possible = get_architecture(model.config).layout.has_dense_target(model.config.get_text_config())
    if sequential and config.reconstruction_target == ReconstructionTarget.DENSE and not possible:
        raise ValueError(
            f"reconstruction_target='dense' needs projections whose outputs are added to the residual stream "
            f"directly, and {model.config._name_or_path or model.config.model_type} normalizes in between. Use "
            f"reconstruction_target='layer'."
        )


@torch.no_grad()
def reconstruct_by_layer(
    subject: Subject,
    kept: Mapping[SiteKey, list[int]],
    config: PruningConfig,
    evidence: Evidence,
    shelf: Shelf | None = None,
    done: Sequence[Reconstruction] = (),
) -> Iterator[Reconstruction]:
    """Yield the new projection parameters of every layer, first to last, while the layer's parameters are in memory.

    `"bias"` adds the mean output of the removed features, `b + W_r E[x_r]` (FLAP, arXiv 2312.11983, eq. 5).
    `"least_squares"` refits the kept columns over the calibration tokens, with a penalty on changes,
    `W_k + Σ r xᵀ (Σ x xᵀ + λI)⁻¹`: x are the kept features and r is the output that the kept columns fail to
    reproduce. Of mixtures, it refits the output projections of the kept experts. Every eighth window is held out. The
    ridge λ with the smallest error on these windows is used; columns are not changed if the error does not fall.

    Args:
        subject (`Subject`): the dense model, which is not changed, with all its sites.
        kept (mapping of site key to `list[int]`): the kept units.
        config (`PruningConfig`): the request, for `reconstruction` (or the method's own), `reconstruction_order`,
            `reconstruction_target`, `ridge`, `refit_sources` and `batch_size`.
        evidence (`Evidence`): the tokens, which `"least_squares"` passes through the model again; moments for
            `"bias"`, which are collected if there are none; and Gram matrices, if they were collected before.
        shelf (`Shelf`, *optional*): storage for hidden states, and the progress of an interrupted run, which is
            resumed.
        done (sequence of `Reconstruction`): the reconstructions of the first layers by an interrupted run.

    Raises:
        ValueError: where calibration tokens are missing, or activations contain NaN or infinity.
    """
    if len(done) == len(subject.layers):
        yield from (layer.placed_like(subject.sites) for layer in done)
        return
    kind, shelf = config.reconstruction, shelf or Shelf()
    losing = subject.losing(kept)
    in_order = config.reconstruction_order != ReconstructionOrder.INDEPENDENT
    if kind == ReconstructionKind.LEAST_SQUARES:
        # Sites before and, in sequence, after a removed site can compensate for it.
        losing += [site for site in subject.sites if not kept[site.key]]
    # Biases need the means only.
    has_means = kind == ReconstructionKind.BIAS and bool(evidence.statistics)
    if kind != ReconstructionKind.NONE and losing and evidence.calibration is None and not has_means:
        raise ValueError(f"reconstruction={kind!r} needs calibration tokens.")
    if kind == ReconstructionKind.LEAST_SQUARES and not in_order:
        _warn_of_gaps(subject, kept)
    if kind != ReconstructionKind.LEAST_SQUARES or not losing:
        yield from _biases_by_layer(subject, kept, config, evidence, shelf)
        return
    assert evidence.calibration is not None
    warn_of_few_tokens(losing, kept, evidence.calibration)
    refitted: Iterable[Refitted]
    if not in_order and all(site.routing is None for site in subject.losing(kept)):
        refitted = refit_independently(subject, kept, config, evidence, shelf)
    else:
        texts = fit_and_held_out(evidence.calibration)
        fit = replace(_sequential_fit(subject, kept, config), dense_stream=evidence.dense_stream)
        refitted = refit_in_sequence(subject, kept, texts, fit, shelf, done)
    for number, (projections, refits) in enumerate(refitted):
        if number < len(done):
            yield done[number].placed_like(subject.sites)
            continue
        details = {str(key): refit.summary() for key, refit in refits.items()}
        yield Reconstruction(projections, details)


def _warn_of_gaps(subject: Subject, kept: Mapping[SiteKey, list[int]]) -> None:
    """Warn where independent least squares does not compensate for removed layers and sublayers."""
    gone = sum(not kept[site.key] for site in subject.sites)
    if gone and not takes_over(subject):
        logger.warning(
            "The residual stream of this %s is normalized between its layers, so that no projection compensates for "
            "removed sublayers (%d).",
            subject.model.config.model_type,
            gone,
        )


def target_of(subject: Subject, kept: Mapping[SiteKey, Sequence[int]], config: PruningConfig) -> ReconstructionTarget:
    """Return the target of least squares layer by layer: that of the request, or the default for the model."""
    if config.reconstruction_target is not None:
        return ReconstructionTarget(config.reconstruction_target)
    if not subject.has_dense_target:
        return ReconstructionTarget.LAYER
    has_gap = any(not kept[site.key] for site in subject.sites)
    # A norm after the projection leaves no way to correct the errors of earlier layers. Only gaps can be compensated
    # for, and sources can be fitted to their dense inputs.
    if subject.architecture.layout.output_norm and not has_gap and not config.refit_sources:
        return ReconstructionTarget.LAYER
    return ReconstructionTarget.DENSE


def _sequential_fit(subject: Subject, kept: Mapping[SiteKey, list[int]], config: PruningConfig) -> SequentialFit:
    """Return how the request fits projections one after the other; warn where the family does not allow all of it."""
    on_dense = config.reconstruction_order == ReconstructionOrder.INDEPENDENT
    target = ReconstructionTarget.LAYER if on_dense else target_of(subject, kept, config)
    with_sources = config.refit_sources and target == ReconstructionTarget.DENSE
    if config.refit_sources and not with_sources:
        logger.warning(
            "refit_sources needs projections whose outputs are added to the residual stream directly, and %s "
            "normalizes in between, so that only projections are refitted.",
            subject.model.config.model_type,
        )
    return SequentialFit(target, config.ridge, config.batch_size, with_sources, on_dense=on_dense)


def _biases_by_layer(
    subject: Subject, kept: Mapping[SiteKey, list[int]], config: PruningConfig, evidence: Evidence, shelf: Shelf
) -> Iterator[Reconstruction]:
    """Yield the biases of every layer; there are none if the request has another kind of reconstruction."""
    # A checkpoint has projection biases in all layers of a kind or in none.
    adds_biases = config.reconstruction == ReconstructionKind.BIAS
    biased = {site.kind for site in subject.losing(kept)} if adds_biases else set()
    statistics = evidence.statistics
    if biased and not statistics:
        # Scores for another kind of reconstruction may have no means.
        assert evidence.calibration is not None
        (statistics,) = gather_statistics(subject, [evidence.calibration], config.batch_size, (MOMENTS,))
    placed = PlacedStatistics(subject.sites, statistics)
    for number, layer in enumerate(subject.layers):
        if number < shelf.settled:
            continue
        of_layer = [site for site in subject.sites if site.layer == number and site.kind in biased and kept[site.key]]
        with resident(layer):
            yield Reconstruction(
                {site.key: compensate_bias(site, kept[site.key], placed[site.key]) for site in of_layer}
            )
        shelf.settle(number + 1)


def warn_of_unchanged(sites: Iterable[Site], kept: Mapping[SiteKey, list[int]], details: Mapping[str, Any]) -> None:
    """Warn of sites that lose units and whose error least squares did not reduce."""
    losing = [site for site in sites if 0 < len(kept[site.key]) < site.num_units]
    # Sites without an error are left out.
    lossy = [(site, details[str(site.key)]) for site in losing if str(site.key) in details]
    unchanged = [site for site, detail in lossy if not detail["refitted"] and detail["held_out_error_before"]]
    if unchanged:
        logger.warning(
            "Least squares did not reduce the error on held-out windows at %d of %d sites, whose columns are not "
            "changed: %s. More or other calibration text may help.",
            len(unchanged),
            len(lossy),
            ", ".join(f"{site.kind} of layer {site.layer}" for site in unchanged),
        )


def warn_of_few_tokens(sites: list[Site], kept: Mapping[SiteKey, list[int]], calibration: Calibration) -> None:
    widest = max((len(kept[site.key]) * site.unit_width for site in sites if site.routing is None), default=0)
    if calibration.num_tokens < widest:
        windows, length = calibration.input_ids.shape
        logger.warning(
            "%d calibration tokens are too few to determine the %d kept features of a projection, so that the ridge "
            "does. Use at least %d windows of %d tokens; a few times as many are better.",
            calibration.num_tokens,
            widest,
            -(-widest * windows // calibration.num_tokens),
            length,
        )
