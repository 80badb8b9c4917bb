"""How much each site gives, found by the loss of whole pruned models: `scope="search"`."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .allocation import coarse_multiple, fewest_units, levels_of, prunable_sites
from .architectures import Site, SiteKey
from .calibration import Calibration
from .configuration import PruningConfig
from .gates import Projection, replaced_projections
from .least_squares import DEFAULT_RIDGE, NormalEquations, nested_changes, refit
from .mask_learning import Progress, Schedule, history_by_site, identity_of, learn_rates
from .policies import RatioPolicy, budgets_of, even_rates
from .reconstruction import BIAS, HELD_OUT_EVERY, NONE, compensate_bias, gram_statistics
from .statistics import MOMENTS, collect_statistics
from .utils import check_output_file, progress, save_tensors_atomically


# The scope that asks for it.
SEARCH = "search"

MASKS_PER_STEP, WINDOWS_PER_STEP = 4, 2
SPREAD, LEARNING_RATE = 0.1, 0.02

# Fields of a request that do not change what its search does.
NOT_OF_THE_SEARCH = ("search_checkpoint", "batch_size", "reconstruction_order", "reconstruction_target")

Keep = Callable[[Mapping[SiteKey, torch.Tensor], PruningConfig], dict[SiteKey, list[int]]]


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Args:
        scores (`dict[SiteKey, Tensor[num_units]]`): whose order over all sites gives the widths that were found.
        details (`dict`): steps and windows it took and the expected loss, as JSON values.
        history (`dict[str, Tensor]`): as of policy-gradient pruning.
    """

    scores: dict[SiteKey, torch.Tensor]
    details: dict[str, Any]
    history: dict[str, torch.Tensor]


def check_search(model: PreTrainedModel, config: PruningConfig) -> None:
    """Raise `ValueError` or `OSError` where a search would fail for the model or the request, before it is run."""
    if config.search_windows < MASKS_PER_STEP * WINDOWS_PER_STEP:
        raise ValueError(
            f"search_windows={config.search_windows} is too few for one step of {MASKS_PER_STEP} candidates on "
            f"{WINDOWS_PER_STEP} windows; give at least {MASKS_PER_STEP * WINDOWS_PER_STEP}, or use scope='global'."
        )
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} predicts no next token, and scope='search' compares the losses of those. Search "
            f"with its causal counterpart and replay the plan, or use scope='global'."
        )
    if config.search_checkpoint is not None:
        check_output_file(config.search_checkpoint)


@torch.no_grad()
def search(
    model: PreTrainedModel,
    sites: Sequence[Site],
    scores: Mapping[SiteKey, torch.Tensor],
    config: PruningConfig,
    kind: str,
    calibration: Calibration,
    keep: Keep,
) -> Found:
    """Learn how much of each site to keep, by policy gradient over keep ratios (arXiv 2406.10576, with normal draws).

    Every candidate is a whole model within the budget, its projections reconstructed: errors of its sites accumulate
    in its loss. Candidates of a step share their tokens. Sites are reconstructed beforehand, MLPs at
    `allocation.LEVELS` widths.

    Args:
        model (`PreTrainedModel`): the dense model; it is not changed.
        sites (sequence of `Site`): all its sites.
        scores (mapping of site key to `Tensor[num_units]`): which units of a site stay longest.
        config (`PruningConfig`): the request; `search_windows` bounds the forward passes.
        kind (`str`): reconstruction that candidates get.
        calibration (`Calibration`): the tokens.
        keep (`Callable`): scores and a request in, what that request keeps under them out.

    Raises:
        ValueError: where nothing can move.
    """
    steps = config.search_windows // (MASKS_PER_STEP * WINDOWS_PER_STEP)
    learned = prunable_sites(sites, config)
    fixed = {site.key: scores[site.key] for site in sites}
    coarse = replace(config, multiple_of=coarse_multiple(learned, config))
    try:
        kept = keep(fixed, coarse)
    except ValueError:
        # The last fraction of a grid step is needed, or what the request itself asks for is not to be had.
        coarse = config
        kept = keep(fixed, coarse)
    floors = [fewest_units(site, coarse) / site.num_units for site in learned]
    budgets = budgets_of(learned, kept, coarse, [1] * len(learned), floors, exact=True)
    if all(len(budget.members) == 1 for budget in budgets):
        raise ValueError("scope='search' moves budget between sites, and only one of each kind is pruned here.")
    policy = RatioPolicy(learned, budgets, scores, SPREAD, lambda found: keep(fixed | dict(found), coarse))
    state = Progress(0, even_rates(budgets, len(learned)))
    checkpoint, identity = None, None
    if config.search_checkpoint is not None:
        checkpoint = check_output_file(config.search_checkpoint)
        identity = identity_of(model, calibration, config, NOT_OF_THE_SEARCH)
        identity["scores"] = [float(scores[site.key].double().sum()) for site in learned]
        if checkpoint.exists():
            state = Progress.load(checkpoint, identity)
    schedule = Schedule(
        steps=steps,
        learning_rate=LEARNING_RATE,
        estimator="leave_one_out",
        masks_per_step=MASKS_PER_STEP,
        antithetic=False,
        windows_per_step=WINDOWS_PER_STEP,
        baseline_horizon=1.0,
        stop_when_flat=None,
        batch_size=config.batch_size,
        seed=config.seed,
        prunable_parameters=sum(site.num_parameters for site in sites),
        normalize=True,
    )
    with tempfile.TemporaryDirectory(prefix="fwdprune-levels-") as folder:
        projection = None
        if state.step < steps:
            projection = _projections(model, learned, scores, coarse, kind, calibration, Path(folder))
        masked = None if projection is None else _replacing(learned, projection)
        learn_rates(model, learned, calibration, policy, state, schedule, checkpoint, 20, identity, masked)
    found = policy.scores(state.rates).split([site.num_units for site in learned])
    values = {site.key: torch.ones(site.num_units) for site in sites}
    values |= {site.key: part for site, part in zip(learned, found)}
    details = {
        "steps": state.step,
        "windows": state.step * MASKS_PER_STEP * WINDOWS_PER_STEP,
        "expected_loss": state.expected_loss,
    }
    return Found(values, details, history_by_site(state, learned))


def _replacing(
    sites: Sequence[Site], projection: Callable[[Site, int], Projection]
) -> Callable[[torch.Tensor], AbstractContextManager]:
    sizes = [site.num_units for site in sites]

    def masked(mask: torch.Tensor) -> AbstractContextManager:
        widths = [int(part.sum()) for part in mask.split(sizes)]
        return replaced_projections(
            sites,
            {site.key: projection(site, width) for site, width in zip(sites, widths) if width < site.num_units},
        )

    return masked


def _projections(
    model: PreTrainedModel,
    sites: Sequence[Site],
    scores: Mapping[SiteKey, torch.Tensor],
    config: PruningConfig,
    kind: str,
    calibration: Calibration,
    folder: Path,
) -> Callable[[Site, int], Projection] | None:
    """What gives a site's projection at a width; `None` where masks alone say it all."""
    if kind == NONE:
        return None
    kept = {site.key: {len(units): units for units in levels_of(site, scores[site.key], config)} for site in sites}
    if kind == BIAS:
        moments = collect_statistics(model, sites, calibration, config.batch_size, (MOMENTS,))
        return lambda site, width: compensate_bias(site, kept[site.key][width], moments[site.key])
    texts = calibration.split(HELD_OUT_EVERY)
    cut = [site for site in sites if kept[site.key]]
    measured = gram_statistics(model, cut, texts, config.batch_size)
    for site, statistics in progress(measured, "Reconstructing levels", total=len(cut), unit="site"):
        grams = [each.gram for each in statistics if each.gram is not None]
        ridge = _ridge(site, kept[site.key], grams, [each.count for each in statistics], config.ridge)
        levels = _refitted(site, kept[site.key], functools.reduce(torch.add, grams), ridge)
        save_tensors_atomically(folder / _file(site), levels, {})
    # Memory-mapped: a level is read when it is used, and the system keeps what is used often.
    files = {site.key: safe_open(folder / _file(site), framework="pt") for site in cut}

    def projection(site: Site, width: int) -> Projection:
        weight = files[site.key].get_tensor(str(width)).to(site.projection.weight.device)
        return Projection(kept[site.key][width], weight, site.projection.bias)

    return projection


def _file(site: Site) -> str:
    return f"{site.layer}.{site.kind}.safetensors"


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
    found = refit(fit, held_out, ridge)
    return None if found.change is None else found.ridge


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
        levels[str(count)] = (weight[:, columns].double() + change[:, places]).to(weight.dtype)
    return levels
