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
    fewest_units,
    levels_of,
    prunable_sites,
)
from ..allocation.job import Job
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
from ..scoring.learning.policies import Ratios, Variables, budgets_of, even_rates
from .descent import FIRST_STEP, LAST_STEP, PARTS, Descent, SearchState
from .levels import Levels


logger = get_logger(__name__)


# The windows that models are compared on are as many as allow this number of sweeps.
SWEEPS = 6

KeepUnder = Callable[[Mapping[SiteKey, torch.Tensor], PruningConfig], dict[SiteKey, list[int]]]


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Args:
        scores (`dict[SiteKey, Tensor[num_units]]`): scores whose order over all sites leads to the best widths.
        details (`dict`): numbers of sweeps and windows, and the divergence from the dense model of the even share and
            of the result, in nats per token, as JSON values.
        history (`dict[str, Tensor]`): `loss` (the divergence) and `expected_sparsity` `[sweeps + 1]`, and
            `keep_rate.<layer>.<kind>` of every site.
    """

    scores: dict[SiteKey, torch.Tensor]
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
    fixed = {site.key: scores[site.key] for site in sites}
    candidates = prunable_sites(sites, config)
    coarse, kept = _on_coarse_grid(candidates, fixed, config, keep)
    # A site that cannot be narrowed has no width to search.
    learned = [site for site in candidates if levels_of(site, scores[site.key], coarse)]
    if not learned:
        raise ValueError("scope='search' has no site that may be narrowed; change skip_layers or min_units_per_site.")
    variables = [Variables(site, 1, fewest_units(site, coarse) / site.num_units) for site in learned]
    budgets = budgets_of(variables, kept, coarse, exact=True, cost=cost)
    if all(len(budget.members) == 1 for budget in budgets):
        raise ValueError(
            "scope='search' moves budget between sites, and only one site of each kind is pruned here. Prune more "
            "layers, or use scope='layer'."
        )
    ratios = Ratios(learned, scores, lambda values: keep(fixed | dict(values), coarse))
    fit, judging = calibration.split(HELD_OUT_EVERY)
    price = _price(learned, len(subject.layers))
    judging = _as_many_as_allowed(judging or fit, learned, price, config)

    by_name = ((str(site.key), scores[site.key]) for site in learned)
    costs = [cost.total(site) for site in learned]
    stage = job.resume.stage("search", calibration, scores=digest_of(by_name), costs=costs)
    state = stage.load(SearchState.of) or SearchState(torch.zeros(0, dtype=torch.float64), FIRST_STEP)
    with tempfile.TemporaryDirectory(prefix="fwdprune-levels-") as folder:
        if state.step >= LAST_STEP:
            levels = Levels(subject.looking_at(learned), scores, coarse, fit, Path(folder), job.resume)
            divergence = Divergence(subject.looking_at(learned), judging, config.batch_size)
            descent = Descent(ratios, budgets, levels, divergence, cost, len(judging.input_ids))
            if not len(state.rates):
                starts = [even_rates(budgets, len(learned))]
                if (without_ends := _start_without_ends(learned, fixed, coarse, keep)) is not None:
                    starts.append(without_ends)
                descent.start(state, starts)

            try:
                descent.run(state, price, config.search_windows, stage)
            except KeyboardInterrupt:
                if ranks.world_size() > 1:
                    # The other processes may be at other places of their sweep.
                    raise
                logger.warning(
                    "The search was interrupted after %d sweeps. Pruning continues with its best result so far.",
                    state.sweeps,
                )
    order = {site.key: torch.ones(site.num_units, dtype=torch.float32) for site in sites} | ratios.by_site(state.rates)
    details = {
        "sweeps": state.sweeps,
        "windows": state.windows,
        "even_divergence": state.even,
        "divergence": state.losses[-1],
    }
    return Found(order, details, state.history(learned, sites))


def _on_coarse_grid(
    sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor], config: PruningConfig, keep: KeepUnder
) -> tuple[PruningConfig, dict[SiteKey, list[int]]]:
    """Return the request with the largest `multiple_of` that its budget can be met with, and the units it keeps."""
    multiple = coarse_multiple(sites, config)
    while multiple > config.multiple_of:
        coarse = replace(config, multiple_of=multiple)
        try:
            return coarse, keep(scores, coarse)
        except ValueError:
            # The budget needs a finer grid, or cannot be met at all, which the last line raises.
            multiple = multiple // config.multiple_of // 2 * config.multiple_of
    return config, keep(scores, config)


def _start_without_ends(
    sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor], coarse: PruningConfig, keep: KeepUnder
) -> torch.Tensor | None:
    """Return keep ratios that leave the ends of a deep model unpruned; `None` where these cannot meet the budget."""
    if coarse.skip_layers is not None or 1 + max(site.layer for site in sites) < FEWEST_WITH_ENDS:
        return None
    try:
        kept = keep(scores, replace(coarse, skip_layers=ENDS))
    except ValueError:
        return None
    return torch.tensor([len(kept[site.key]) / site.num_units for site in sites], dtype=torch.float64)


def _price(sites: Sequence[Site], layers: int) -> float:
    """Return the largest number of passes of one window through all layers that a sweep and its move take."""
    # A site is measured from its layer to the last one. A move that is taken is passed through all layers once more.
    return sum(layers - site.layer for site in sites) / layers + len(PARTS) + 1


def _as_many_as_allowed(
    judging: Calibration, sites: Sequence[Site], price: float, config: PruningConfig
) -> Calibration:
    """Return the windows to compare models on: as many as allow `SWEEPS` sweeps, but at least one.

    Raises:
        ValueError: where the request allows no sweep at all.
    """
    # Before the first sweep the dense model, two starting points, and the better of them again are run.
    fewest = math.ceil(price) + 4
    if config.search_windows < fewest:
        raise ValueError(
            f"search_windows={config.search_windows} is too small to try {len(sites)} sites and {len(PARTS)} moves on "
            f"one window; set it to at least {fewest}, or use scope='global'."
        )
    allowed = int(config.search_windows / (SWEEPS * price + 4))
    return Calibration(*judging.windows(slice(max(1, allowed))), judging.source)
