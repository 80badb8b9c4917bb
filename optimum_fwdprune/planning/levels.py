"""The levels of a search: every site at several widths, reconstructed before the search starts."""

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
    """Projections of sites at several widths. Refitted ones are stored in files, and read when they are used.

    Args:
        subject (`Subject`): the dense model, which is not changed, with the sites whose widths are searched.
        scores (mapping of site key to `Tensor[num_units]`): scores, which order the units of a site.
        config (`PruningConfig`): the request, whose `multiple_of` is the step of the widths.
        calibration (`Calibration`): the tokens to reconstruct on.
        folder (`Path`): folder for the refitted columns.
        resume (`Resume`, *optional*): folder for the state of the statistics.
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
                grams = [part.gram for part in statistics if part.gram is not None]
                ridge = _ridge(site, kept, grams, [part.count for part in statistics], config.ridge)
                file = folder / f"{site.key}.safetensors"
                save_tensors_atomically(file, _refitted(site, kept, functools.reduce(torch.add, grams), ridge), {})
                # The file is memory-mapped, so that the system caches the columns that are used often.
                self._files[site.key] = safe_open(file, framework="pt")

    def widths(self, site: Site) -> list[int]:
        """Return the numbers of units that the site may keep in decreasing order: all of them, then its levels."""
        return [site.num_units, *self._kept[site.key]]

    def projection(self, site: Site, width: int) -> Projection | None:
        """Return the projection of `site` with `width` units; `None` where these are all units."""
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

    def without(self, site: Site) -> Projection:
        """Return the projection of `site` without any unit."""
        with resident(site.projection):
            return kept_projection(site, [])


def _check_space(sites: Sequence[Site], kept: Mapping[SiteKey, dict[int, list[int]]], folder: Path) -> None:
    """Raise `OSError` where the disk cannot hold the columns of all levels."""
    needed = 0
    for site in sites:
        weight = site.projection.weight
        needed += sum(kept[site.key]) * site.unit_width * weight.shape[0] * weight.element_size()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The levels of scope='search' take {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB "
            f"free. Set TMPDIR to a folder on a larger disk."
        )


def _ridge(
    site: Site, kept: dict[int, list[int]], grams: list[torch.Tensor], counts: list[int], ridge: float | None
) -> float | None:
    """Return the ridge of all levels, the best one on held-out windows at the middle level; `None` if none helps."""
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
    """Return the columns at every level in the order of the features; they are not refitted if `ridge` is `None`."""
    weight = site.projection.weight
    if ridge is None:
        return {str(count): weight[:, site.kept_features(units)] for count, units in kept.items()}
    # Units that the narrowest levels keep come first. Every level keeps a subset of the units of the next wider one.
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
