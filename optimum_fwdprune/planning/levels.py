"""Every site at every width that it may get, reconstructed beforehand: what a search chooses from."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..allocation.constraints import levels_of
from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..files import save_tensors_atomically
from ..forward.gates import Projection, kept_projection
from ..forward.gathering import collect_statistics
from ..forward.statistics import MOMENTS, PlacedStatistics, SiteStatistics
from ..loading.offloading import resident
from ..loading.subject import Subject
from ..reconstruction.bias import compensate_bias
from ..reconstruction.independent import fit_and_held_out, gram_statistics
from ..reconstruction.least_squares import (
    DEFAULT_RIDGE,
    NormalEquations,
    nested_changes,
    refit,
)
from ..request.choices import ReconstructionKind
from ..request.config import PruningConfig
from ..runs.devices import back_to, precise
from ..runs.progress import progress
from ..runs.resume import Resume


class Levels:
    """Projections of sites at several widths. Those that are refitted lie in files and are read when they are used.

    Args:
        subject (`Subject`): the dense model, which is not changed, with the sites whose widths are looked for.
        scores (mapping of site key to `Tensor[num_units]`): which units of a site stay longest.
        config (`PruningConfig`): the request, its `multiple_of` as coarse as the widths are to be.
        calibration (`Calibration`): the tokens to reconstruct on.
        folder (`Path`): where to keep refitted columns.
        resume (`Resume`, *optional*): where sums of statistics are kept.
    """

    def __init__(
        self,
        subject: Subject,
        scores: Mapping[SiteKey, torch.Tensor],
        config: PruningConfig,
        calibration: Calibration,
        folder: Path,
        resume: Resume | None = None,
    ):
        sites = subject.sites
        self._kept = {
            site.key: {len(units): units for units in levels_of(site, scores[site.key], config)} for site in sites
        }
        self._moments: Mapping[SiteKey, SiteStatistics] = {}
        self._files: dict[SiteKey, Any] = {}
        cut = [site for site in sites if self._kept[site.key]]
        if config.reconstruction == ReconstructionKind.BIAS:
            moments = collect_statistics(subject.looking_at(cut), calibration, config.batch_size, (MOMENTS,), resume)
            self._moments = PlacedStatistics(cut, moments)
        if config.reconstruction == ReconstructionKind.LEAST_SQUARES:
            _check_space(cut, self._kept, folder)
            measured = gram_statistics(subject.looking_at(cut), fit_and_held_out(calibration), config.batch_size)
            for site, statistics in progress(measured, "Reconstructing levels", total=len(cut), unit="site"):
                kept = self._kept[site.key]
                grams = [of_text.gram for of_text in statistics if of_text.gram is not None]
                ridge = _ridge(site, kept, grams, [of_text.count for of_text in statistics], config.ridge)
                file = folder / f"{site.key}.safetensors"
                save_tensors_atomically(file, _refitted(site, kept, functools.reduce(torch.add, grams), ridge), {})
                # Memory-mapped: the system keeps what is used often.
                self._files[site.key] = safe_open(file, framework="pt")

    def widths(self, site: Site) -> list[int]:
        """Return how many units the site may keep, most first: all of them, and each of its levels."""
        return [site.num_units, *self._kept[site.key]]

    def projection(self, site: Site, width: int) -> Projection | None:
        """Return the projection of `site` with so many units; `None` where that is all of them."""
        if width == site.num_units:
            return None
        kept = self._kept[site.key][width]
        with resident(site.projection):
            if site.key in self._moments:
                return compensate_bias(site, kept, self._moments[site.key])
            if site.key in self._files:
                columns = self._files[site.key].get_tensor(str(width)).to(site.projection.weight.device)
                return Projection(kept, columns, site.projection.bias)
            return kept_projection(site, kept)


def _check_space(sites: Sequence[Site], kept: Mapping[SiteKey, dict[int, list[int]]], folder: Path) -> None:
    """Raise `OSError` where the disk cannot hold the columns of all levels."""
    needed = 0
    for site in sites:
        weight = site.projection.weight
        needed += sum(kept[site.key]) * site.unit_width * weight.shape[0] * weight.element_size()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The levels of scope='search' take {needed / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB. "
            f"Let TMPDIR name a folder on a larger disk."
        )


def _ridge(
    site: Site, kept: dict[int, list[int]], grams: list[torch.Tensor], counts: list[int], ridge: float | None
) -> float | None:
    """The ridge of all levels: the best on held-out windows at the middle level, or `None` where none is any good."""
    if len(grams) < 2:
        return DEFAULT_RIDGE if ridge is None else ridge
    columns = site.kept_features(list(kept.values())[len(kept) // 2])
    fit, held_out = (
        NormalEquations.of_removed(gram, count, site.projection.weight, columns) for gram, count in zip(grams, counts)
    )
    at_middle = refit(fit, held_out, ridge)
    return None if at_middle.change is None else at_middle.ridge


def _refitted(
    site: Site, kept: dict[int, list[int]], gram: torch.Tensor, ridge: float | None
) -> dict[str, torch.Tensor]:
    """The columns at every level, in the order of the features: refitted, or as they are where `ridge` is `None`."""
    weight = site.projection.weight
    if ridge is None:
        return {str(count): weight[:, site.kept_features(units)] for count, units in kept.items()}
    # Those that stay longest first: every level keeps a part of what the one above it keeps.
    unit_order: list[int] = []
    for units in [*reversed(kept.values()), range(site.num_units)]:
        present = set(unit_order)
        unit_order += [unit for unit in units if unit not in present]
    order = torch.arange(weight.shape[1]).view(site.num_units, -1)[unit_order].flatten().to(weight.device)
    widths = [width * site.unit_width for width in kept]
    levels = {}
    for count, change in zip(kept, nested_changes(gram, weight, order, widths, ridge)):
        places = order[: change.shape[1]].argsort()
        columns = order[: change.shape[1]][places]
        levels[str(count)] = back_to(precise(weight[:, columns]) + change[:, places.to(change.device)], weight)
    return levels
