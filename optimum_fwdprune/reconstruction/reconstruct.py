"""What the kept input features of an output projection can do about the removed ones."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import Site, SiteKey, get_architecture
from ..data.calibration import Calibration
from ..forward.gates import Projection
from ..forward.gathering import gather_statistics
from ..forward.layerwise import decoder_layers
from ..forward.statistics import (
    MOMENTS,
    PlacedStatistics,
    SiteStatistics,
)
from ..loading.offloading import resident
from ..request.config import PruningConfig
from ..runs.loggers import get_logger
from ..runs.resume import Resume
from ..runs.shelves import Shelf
from .bias import compensate_bias
from .independent import HELD_OUT_EVERY, Grams, refit_independently
from .kinds import BIAS, INDEPENDENT, LEAST_SQUARES, NONE
from .reconstruction import Reconstruction
from .sequential import (
    DENSE,
    LAYER,
    Refitted,
    refit_in_sequence,
)


logger = get_logger(__name__)


def check_reconstruction(model: PreTrainedModel, config: PruningConfig) -> None:
    """Raise `ValueError` where `model` does not allow the reconstruction that the request asks for."""
    least_squares = config.reconstruction == LEAST_SQUARES
    sequential = least_squares and config.reconstruction_order != INDEPENDENT
    if sequential and config.reconstruction_target == DENSE and not _adds_up(model):
        raise ValueError(
            f"reconstruction_target='dense' needs projections that add to the residual stream as they are, and "
            f"{model.config._name_or_path or model.config.model_type} normalizes in between. Use "
            f"reconstruction_target='layer'."
        )


def _adds_up(model: PreTrainedModel) -> bool:
    return get_architecture(model.config).residual_adds_up(model.config)


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    sites: Iterable[Site],
    kept: Mapping[SiteKey, list[int]],
    config: PruningConfig,
    calibration: Calibration | None,
    statistics: Mapping[SiteKey, SiteStatistics] | None = None,
    grams: Grams | None = None,
    resume: Resume | None = None,
) -> Reconstruction:
    """Return new projection parameters for the sites.

    `"bias"` adds the mean output of the removed features, `b + W_r E[x_r]` (FLAP, arXiv 2312.11983, eq. 5).
    `"least_squares"` refits the kept columns over the calibration tokens, pulled towards what they were,
    `W_k + Σ r xᵀ (Σ x xᵀ + λI)⁻¹`: x are the kept features and r is what they should say and do not. Every eighth
    window is held out; the ridge λ that does best on these is used, and where none is better than the columns as they
    are, they stay.

    Args:
        model (`PreTrainedModel`): the dense model; it is not changed.
        sites (iterable of `Site`): its sites.
        kept (mapping of site key to `list[int]`): units that stay.
        config (`PruningConfig`): `reconstruction` (or the method's own), `reconstruction_order`,
            `reconstruction_target`, `ridge` and `batch_size`.
        calibration (`Calibration`, *optional*): the tokens. `"least_squares"` passes over them again.
        statistics (mapping of site key to `SiteStatistics`, *optional*): moments for `"bias"`, which gathers them
            where there are none.
        grams (`Grams`, *optional*): for independent least squares, where they were gathered before.
        resume (`Resume`, *optional*): where the layers that are done are kept.
    """
    sites = list(sites)
    projections: dict[SiteKey, Projection] = {}
    details: dict[str, Any] = {}
    if any(len(kept[site.key]) < site.num_units for site in sites):
        # The next of several rounds belongs to a model that is the same to the bit, on any device.
        resume = Resume() if config.reconstruction == NONE or resume is None else resume
        about = hashlib.sha256(json.dumps(sorted(kept.items())).encode()).hexdigest()[:16]
        stages = [
            resume.stage(f"reconstruction-{number}", calibration, kept=about)
            for number in range(len(decoder_layers(model)))
        ]
        states = itertools.takewhile(bool, (stage.load(Reconstruction.of) for stage in stages))
        done = [state.placed_like(sites) for state in states if state is not None]
        by_layer: Iterable[Reconstruction] = done
        if len(done) < len(stages):
            by_layer = reconstruct_by_layer(model, sites, kept, config, calibration, statistics, grams, done=done)
        for number, found in enumerate(by_layer):
            projections |= found.projections
            details |= found.details
            if number >= len(done):
                stages[number].save(found.state)
    warn_of_unchanged(sites, kept, details)
    return Reconstruction(projections, details)


@torch.no_grad()
def reconstruct_by_layer(
    model: PreTrainedModel,
    sites: Sequence[Site],
    kept: Mapping[SiteKey, list[int]],
    config: PruningConfig,
    calibration: Calibration | None,
    statistics: Mapping[SiteKey, SiteStatistics] | None = None,
    grams: Grams | None = None,
    shelf: Shelf | None = None,
    done: Sequence[Reconstruction] = (),
) -> Iterator[Reconstruction]:
    """Yield what `reconstruct` returns, layer after layer, each with the layer's parameters in memory meanwhile.

    Args:
        shelf (`Shelf`, *optional*): where hidden states wait, and how far an interrupted run came, which goes on
            there; the other arguments are those of `reconstruct`.
        done (sequence of `Reconstruction`): of the first layers, where they are known.
    """
    kind = config.reconstruction
    losing = [site for site in sites if len(kept[site.key]) < site.num_units]
    # Biases take no more than the means.
    if kind != NONE and losing and calibration is None and not (kind == BIAS and statistics):
        raise ValueError(f"reconstruction={kind!r} needs calibration tokens.")
    shelf = shelf or Shelf()
    if kind == LEAST_SQUARES and losing:
        assert calibration is not None
        warn_of_few_tokens(losing, kept, calibration)
        fit, held_out = calibration.split(HELD_OUT_EVERY)
        found: Iterable[Refitted]
        if config.reconstruction_order == INDEPENDENT:
            found = refit_independently(model, losing, kept, config, (fit, held_out), grams, shelf)
        else:
            target = config.reconstruction_target or (DENSE if _adds_up(model) else LAYER)
            texts = (fit, held_out)
            known = [each.projections for each in done]
            with_sources = config.refit_sources and target == DENSE
            if config.refit_sources and not with_sources:
                logger.warning(
                    "refit_sources aims at the dense model's residual stream, which %s normalizes in between: only "
                    "projections are refitted.",
                    model.config.model_type,
                )
            found = refit_in_sequence(
                model, sites, kept, target, config.ridge, *texts, config.batch_size, shelf, known, with_sources
            )
        for number, (projections, refits) in enumerate(found):
            if number < len(done):
                yield done[number]
                continue
            details = {str(key): refit.summary() for key, refit in refits.items()}
            yield Reconstruction(projections, details)
        return
    # A checkpoint has projection biases in all layers of a kind or in none.
    biased = {site.kind for site in losing} if kind == BIAS else set()
    if biased and not statistics:
        # Scores that were made for another reconstruction may lack the means.
        assert calibration is not None
        (statistics,) = gather_statistics(model, sites, [calibration], config.batch_size, (MOMENTS,))
    placed = PlacedStatistics(sites, statistics or {})
    for number, layer in enumerate(decoder_layers(model)):
        if number < shelf.settled:
            continue
        of_layer = [site for site in sites if site.layer == number and site.kind in biased]
        with resident(layer):
            yield Reconstruction(
                {site.key: compensate_bias(site, kept[site.key], placed[site.key]) for site in of_layer}
            )
        shelf.settle(number + 1)


def warn_of_unchanged(sites: Iterable[Site], kept: Mapping[SiteKey, list[int]], details: Mapping[str, Any]) -> None:
    """Say at which of the sites that lose units least squares was of no use."""
    losing = [site for site in sites if len(kept[site.key]) < site.num_units]
    # Where nothing was lost, there was nothing to gain either.
    lossy = [(site, details[str(site.key)]) for site in losing if str(site.key) in details]
    unchanged = [site for site, found in lossy if not found["refitted"] and found["held_out_error_before"]]
    if unchanged:
        logger.warning(
            "Least squares did not help on the held-out windows at %d of %d sites, which keep their columns as they "
            "are: %s. More or other calibration text may change that.",
            len(unchanged),
            len(lossy),
            ", ".join(f"{site.kind} of layer {site.layer}" for site in unchanged),
        )


def warn_of_few_tokens(sites: list[Site], kept: Mapping[SiteKey, list[int]], calibration: Calibration) -> None:
    widest = max(len(kept[site.key]) * site.unit_width for site in sites)
    if calibration.num_tokens < widest:
        windows, length = calibration.input_ids.shape
        logger.warning(
            "%d calibration tokens cannot settle the %d kept features of a projection, so the ridge has to. %d "
            "windows of %d tokens would do, a few times as many are better.",
            calibration.num_tokens,
            widest,
            -(-widest * windows // calibration.num_tokens),
            length,
        )
