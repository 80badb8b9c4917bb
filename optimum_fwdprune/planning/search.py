"""The search of `scope="search"`, which decides by the loss of whole pruned models how many units each site keeps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..allocation.constraints import (
    ENDS,
    FEWEST_WITH_ENDS,
    coarse_multiple,
    levels_of,
    prunable_sites,
)
from ..allocation.depth import open_units
from ..allocation.job import Job
from ..allocation.widths import channel_multiple
from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..forward.divergence import Divergence
from ..loading.subject import Subject
from ..reconstruction.independent import HELD_OUT_EVERY
from ..request.config import PruningConfig
from ..runs import ranks
from ..runs.loggers import get_logger
from ..runs.resume import (
    digest_of,
)
from .descent import EXCHANGES, LAST_STEP, PARTS, WINDOWS_OF_START, Descent
from .levels import Levels
from .search_state import SearchState, state_of, states_of
from .space import Choice, KeepUnder, Space


logger = get_logger(__name__)


# The windows that models are compared on are as many as allow this number of sweeps from every starting point.
SWEEPS = 6


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Args:
        scores (`dict[SiteKey, Tensor[num_units]]`): scores whose order over all sites leads to the best widths.
        config (`PruningConfig`): the request, with the share of the layers or sublayers that go.
        details (`dict`): numbers of sweeps and windows, and the divergence from the dense model of the even share and
            of the result, in nats per token, and which layers or sublayers are removed, as JSON values.
        history (`dict[str, Tensor]`): `loss` (the divergence) and `expected_sparsity` `[sweeps + 1]`, and
            `keep_rate.<layer>.<kind>` of every site.
    """

    scores: dict[SiteKey, torch.Tensor]
    config: PruningConfig
    details: dict[str, Any]
    history: dict[str, torch.Tensor]


def check_search(model: PreTrainedModel, config: PruningConfig) -> None:
    """Raise `ValueError` where a search is impossible for the model."""
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} predicts no next token, and scope='search' compares the predictions of whole "
            f"models. Search with its causal counterpart and replay the plan, or use scope='global'."
        )


@torch.no_grad()
def search(
    subject: Subject,
    scores: Mapping[SiteKey, torch.Tensor],
    job: Job,
    calibration: Calibration,
    keep: KeepUnder,
) -> Found:
    """Move budget between sites as long as the divergence of the whole pruned model from the dense one falls.

    The search starts from the even share, in which every site keeps the same share of its units. In a deep model it
    starts with the first and last two layers unpruned, if that is closer to the dense model. A sweep narrows one site
    after the other by a step, with all other sites pruned and reconstructed, and measures the divergence of the whole
    model. The divergence includes the accumulated errors of all sites, and all candidates are compared on the same
    tokens. Several processes share the sites of a sweep. Then all keep ratios are moved at once along the logarithm of
    the divergence per unit of saved cost. Three lengths of the move are tried; the best is taken if it lowers the
    divergence, else the step is halved. In a single process an interrupt (Ctrl-C) ends the search with its best result
    so far.

    Args:
        subject (`Subject`): the dense model, which is not changed, with all sites whose units may be removed.
        scores (mapping of site key to `Tensor[num_units]`): scores, which order the units of a site.
        job (`Job`): the request, whose `search_windows` limits the forward passes, its budget, and the folder of the
            state.
        calibration (`Calibration`): the tokens; every eighth window is used for comparisons, the others for
            reconstruction.
        keep (`Callable`): returns the units that a request keeps, from scores and the request.

    Raises:
        ValueError: where budget cannot be moved, or `search_windows` is too small for one sweep.
    """
    assert job.budget is not None
    sites, config, cost = subject.sites, job.config, job.budget.cost
    units = [] if config.depth_kind is None else open_units(sites, config)
    # Units of kinds that nothing is removed from may have no scores.
    keys = (*(site.key for site in sites), *(unit.key for unit in units))
    fixed = {key: scores[key] for key in keys if key in scores}
    candidates = prunable_sites(sites, config)
    coarse = _on_coarse_grid(candidates, fixed, config, keep)
    # A site that cannot be narrowed has no width to search.
    learned = [site for site in candidates if levels_of(site, scores[site.key], coarse)]
    if not learned:
        raise ValueError("scope='search' has no site that may be narrowed; change skip_layers or min_units_per_site.")
    space = Space(sites, learned, fixed, coarse, job.budget, keep)
    starts = space.starts()
    if not space.units and all(len(budget.members) == 1 for budget in space.budgets(starts[0])):
        raise ValueError(
            "scope='search' moves budget between sites, and only one site of each kind is pruned here. Prune more "
            "layers, or use scope='layer'."
        )
    fit, judging = calibration.split(HELD_OUT_EVERY)
    price = _price(space, len(subject.layers))
    judging = _as_many_as_allowed(judging or fit, space, price, len(starts), config)

    by_name = ((str(key), scores[key]) for key in (*(site.key for site in learned), *(unit.key for unit in units)))
    costs = [cost.total(site) for site in learned]
    stage = job.resume.stage("search", calibration, scores=digest_of(by_name), costs=costs)
    states = stage.load(states_of) or []
    with tempfile.TemporaryDirectory(prefix="fwdprune-levels-") as folder:
        if not states or any(state.step >= LAST_STEP for state in states):
            levels = Levels(subject.looking_at(learned), scores, coarse, fit, Path(folder), job.resume)
            divergence = Divergence(subject, judging, config.batch_size)
            descent = Descent(space, levels, divergence, len(judging.input_ids))
            if not states:
                choices = [space.even(gone) for gone in starts]
                if () in starts and (without_ends := _start_without_ends(space, fixed, coarse, keep)) is not None:
                    choices.append(without_ends)
                states = descent.start(choices)
                stage.save(lambda: state_of(states))

            try:
                _descend(descent, states, price, config.search_windows, lambda: stage.save(lambda: state_of(states)))
            except KeyboardInterrupt:
                if ranks.world_size() > 1:
                    # The other processes may be at other places of their sweep.
                    raise
                logger.warning(
                    "The search was interrupted after %d sweeps. Pruning continues with its best result so far.",
                    sum(state.sweeps for state in states),
                )
    best = _best(states)
    details: dict[str, Any] = {
        "sweeps": sum(state.sweeps for state in states),
        "windows": sum(state.windows for state in states),
        "even_divergence": best.even,
        "divergence": best.losses[-1],
    }
    if units:
        details["removed"] = [str(space.units[place]) for place in best.gone]
    return Found(space.scores(best.choice), space.request(best.gone, config), details, best.history(space))


def _descend(
    descent: Descent, states: Sequence[SearchState], price: float, allowed: float, save: Callable[[], None]
) -> None:
    """Descend from every starting point with an equal part of the windows, and from the best result with the rest."""

    def left(state: SearchState, share: float = 1.0) -> float:
        return allowed * share - sum(other.windows for other in states if other is not state)

    for number, state in enumerate(states, 1):
        descent.run(state, price, left(state, number / len(states)), save)
    best = _best(states)
    descent.run(best, price, left(best), save)


def _best(states: Sequence[SearchState]) -> SearchState:
    return min(states, key=lambda state: state.losses[-1])


def _on_coarse_grid(
    sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor], config: PruningConfig, keep: KeepUnder
) -> PruningConfig:
    """Return the request with the largest `multiple_of` that its budget can be met with."""
    multiple, finest = coarse_multiple(sites, config), channel_multiple(sites, config)
    while multiple > finest:
        coarse = replace(config, multiple_of=multiple)
        try:
            keep(scores, coarse)
            return coarse
        except ValueError:
            # The budget needs a finer grid, or cannot be met at all, which the last line raises.
            multiple = multiple // finest // 2 * finest
    keep(scores, config)
    return config


def _start_without_ends(
    space: Space, scores: Mapping[SiteKey, torch.Tensor], coarse: PruningConfig, keep: KeepUnder
) -> Choice | None:
    """Return the choice that leaves the ends of a deep model unpruned; `None` where this cannot meet the budget."""
    if coarse.skip_layers is not None or 1 + max(site.layer for site in space.sites) < FEWEST_WITH_ENDS:
        return None
    try:
        kept = keep(scores, replace(space.request(()), skip_layers=ENDS))
    except ValueError:
        return None
    return Choice(torch.tensor([len(kept[site.key]) for site in space.sites], dtype=torch.float64) / space.sizes)


def _price(space: Space, layers: int) -> float:
    """Return the largest number of passes of one window through all layers that a sweep and its moves take."""
    # A site or layer is measured from its layer to the last one. A move that is taken is passed through all layers
    # once more.
    units = space.units if space.is_open else []
    measured = [*(site.layer for site in space.sites), *(unit.key.layer for unit in units)]
    return sum(layers - layer for layer in measured) / layers + _moves(space) + 1


def _moves(space: Space) -> int:
    return len(PARTS) + (EXCHANGES if space.is_open else 0)


def _as_many_as_allowed(
    judging: Calibration, space: Space, price: float, starts: int, config: PruningConfig
) -> Calibration:
    """Return the windows to compare models on: as many as allow `SWEEPS` sweeps, but at least one.

    Raises:
        ValueError: where the request allows no sweep at all.
    """
    # Before the first sweep the dense model, the starting points, and those that are descended from again are run.
    first = WINDOWS_OF_START + starts + 1 + (2 if starts > 1 else 0)
    fewest = math.ceil(price) + first
    if config.search_windows < fewest:
        units = f" and {len(space.units)} {config.depth_kind}s" if space.is_open else ""
        raise ValueError(
            f"search_windows={config.search_windows} is too small to try {len(space.sites)} sites{units} and "
            f"{_moves(space)} moves on one window; set it to at least {fewest}, or use scope='global'."
        )
    sweeps = 2 * SWEEPS if starts > 1 else SWEEPS
    allowed = int(config.search_windows / (sweeps * price + first))
    return judging.part(slice(max(1, allowed)))
