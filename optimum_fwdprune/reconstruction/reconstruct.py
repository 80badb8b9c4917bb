"""What the kept input features of an output projection can do about the removed ones."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import Site, SiteKey, get_architecture
from ..data.calibration import Calibration
from ..forward.gates import Projection, kept_projection
from ..forward.gathering import gather_statistics, statistics_by_layer
from ..forward.layerwise import decoder_layers
from ..forward.statistics import (
    GRAM,
    MOMENTS,
    PlacedStatistics,
    SiteStatistics,
)
from ..loading.offloading import is_offloaded, resident
from ..request.config import PruningConfig
from ..runs.devices import compute_device
from ..runs.loggers import get_logger
from ..runs.progress import progress
from ..runs.resume import Checkpoint, State
from ..runs.shelves import Shelf
from .least_squares import NormalEquations, refit
from .sequential import (
    DENSE,
    LAYER,
    Refitted,
    refit_in_sequence,
)


logger = get_logger(__name__)

NONE, BIAS, LEAST_SQUARES = "none", "bias", "least_squares"
INDEPENDENT = "independent"

# Statistics that scoring gathers along the way where this kind of reconstruction will follow.
STATISTICS_OF: dict[str, tuple[str, ...]] = {NONE: (), BIAS: (MOMENTS,), LEAST_SQUARES: ()}

# Gram matrices that may be held at the same time, so that they come along with the statistics of scores.
GRAM_BYTES = 2 * 2**30

# Statistics with Gram matrices of every site: on the tokens to fit and on those held out.
Grams = dict[SiteKey, list[SiteStatistics]]

# Every so many calibration windows one is held out, to choose ridges on.
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Reconstruction:
    """What became of the projections.

    Args:
        projections (`dict[SiteKey, Projection]`): new parameters; sites that are not named keep their columns as they
            are.
        details (`dict[str, dict]`): of least squares, by `"<layer>.<kind>"`: the ridge, and the mean squared error on
            held-out tokens of leaving the columns as they are and of refitting them, as JSON values.
    """

    projections: dict[SiteKey, Projection] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def state(self) -> State:
        """Return it as tensors and JSON values."""
        tensors = {}
        for (layer, kind), projection in self.projections.items():
            tensors[f"{layer}.{kind}.weight"] = projection.weight.detach()
            if projection.bias is not None:
                tensors[f"{layer}.{kind}.bias"] = projection.bias.detach()
            tensors |= {f"{layer}.{kind}.source.{name}": weight for name, weight in projection.sources.items()}
        kept = [[layer, kind, projection.kept] for (layer, kind), projection in self.projections.items()]
        return tensors, {"kept": kept, "details": self.details}

    def placed_like(self, sites: Iterable[Site]) -> Reconstruction:
        """Return it with every projection where that of its site computes."""
        placed = {}
        for site in sites:
            if site.key in self.projections:
                found, device = self.projections[site.key], compute_device(site.projection)
                bias = None if found.bias is None else found.bias.to(device)
                sources = {name: weight.to(device) for name, weight in found.sources.items()}
                placed[site.key] = Projection(found.kept, found.weight.to(device), bias, sources)
        return Reconstruction(placed, self.details)

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> Reconstruction:
        """Return what [`state`] made these of."""
        projections = {}
        for layer, kind, units in numbers["kept"]:
            site = f"{layer}.{kind}"
            sources = {
                name.removeprefix(f"{site}.source."): weight
                for name, weight in tensors.items()
                if name.startswith(f"{site}.source.")
            }
            weight, bias = tensors[f"{site}.weight"], tensors.get(f"{site}.bias")
            projections[layer, kind] = Projection(units, weight, bias, sources)
        return cls(projections, numbers["details"])


def added_parameters(sites: Iterable[Site], kind: str) -> int:
    """Return how many parameters a reconstruction adds to the model: biases where projections had none."""
    if kind != BIAS:
        return 0
    return sum(site.projection.out_features for site in sites if site.projection.bias is None)


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


def kinds_with_bias(sites: Iterable[Site], kept: Mapping[SiteKey, list[int]], config: PruningConfig) -> set[str]:
    """Return the kinds of sites whose projections get a bias that they do not have."""
    losing = {site.kind for site in sites if len(kept[site.key]) < site.num_units}
    return {
        site.kind
        for site in sites
        if site.kind in losing and config.reconstruction == BIAS and site.projection.bias is None
    }


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    sites: Iterable[Site],
    kept: Mapping[SiteKey, list[int]],
    config: PruningConfig,
    calibration: Calibration | None,
    statistics: Mapping[SiteKey, SiteStatistics] | None = None,
    grams: Grams | None = None,
    checkpoint: Checkpoint | None = None,
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
        checkpoint (`Checkpoint`, *optional*): where the layers that are done are kept.
    """
    sites = list(sites)
    projections: dict[SiteKey, Projection] = {}
    details: dict[str, Any] = {}
    if any(len(kept[site.key]) < site.num_units for site in sites):
        # The next of several rounds belongs to a model that is the same to the bit, on any device.
        keeps = None if config.reconstruction == NONE else checkpoint
        about = hashlib.sha256(json.dumps(sorted(kept.items())).encode()).hexdigest()[:16]
        stages = [
            (keeps or Checkpoint()).stage(f"reconstruction-{number}", calibration, kept=about)
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
            found = _refit_independently(model, losing, kept, config, (fit, held_out), grams, shelf)
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
            details = {f"{layer}.{kind}": refit.summary() for (layer, kind), refit in refits.items()}
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
    lossy = [(site, details[f"{site.layer}.{site.kind}"]) for site in losing if f"{site.layer}.{site.kind}" in details]
    unchanged = [site for site, found in lossy if not found["refitted"] and found["held_out_error_before"]]
    if unchanged:
        logger.warning(
            "Least squares did not help on the held-out windows at %d of %d sites, which keep their columns as they "
            "are: %s. More or other calibration text may change that.",
            len(unchanged),
            len(lossy),
            ", ".join(f"{site.kind} of layer {site.layer}" for site in unchanged),
        )


def _refit_independently(
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
    checkpoint: Checkpoint | None = None,
) -> tuple[dict[SiteKey, SiteStatistics], Grams]:
    """Gather what scores need and, in the same pass, what independent least squares will; not the latter where the
    model does not fit into memory, whose Gram matrices come layer by layer.

    Args:
        model (`PreTrainedModel`): the dense model.
        sites (sequence of `Site`): all its sites.
        calibration (`Calibration`): the tokens.
        batch_size (`int`): windows per forward pass.
        kinds (iterable of `str`): of statistics that the scores need.
        checkpoint (`Checkpoint`, *optional*): where the sums so far are kept.
    """
    texts = [text for text in calibration.split(HELD_OUT_EVERY) if text is not None]
    with_grams = not is_offloaded(model)
    parts = gather_statistics(model, sites, texts, batch_size, {*kinds, GRAM} if with_grams else kinds, checkpoint)
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


def compensate_bias(site: Site, kept: list[int], statistics: SiteStatistics) -> Projection:
    """Return the projection of the kept columns whose bias says what the removed features said on average."""
    weight, bias = site.projection.weight, site.projection.bias
    features = site.kept_features(kept)
    lost = weight[:, ~features].float() @ statistics.mean[~features]
    total = lost if bias is None else bias.float() + lost
    return Projection(kept, weight[:, features], total.to(weight.dtype))
