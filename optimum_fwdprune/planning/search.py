"""How much each site gives, found by the loss of whole pruned models: `scope="search"`."""

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
from .divergence import Divergence
from .levels import Levels


logger = get_logger(__name__)


# A search should be able to measure all sites about so often.
SWEEPS = 6

KeepUnder = Callable[[Mapping[SiteKey, torch.Tensor], PruningConfig], dict[SiteKey, list[int]]]


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Args:
        scores (`dict[SiteKey, Tensor[num_units]]`): whose order over all sites gives the widths that were found.
        details (`dict`): sweeps and windows it took, and the divergence from the dense model of the even share and of
            what was found, in nats per token, as JSON values.
        history (`dict[str, Tensor]`): `loss` (the divergence) and `expected_sparsity` `[sweeps + 1]`, and
            `keep_rate.<layer>.<kind>` of every site.
    """

    scores: dict[SiteKey, torch.Tensor]
    details: dict[str, Any]
    history: dict[str, torch.Tensor]


def check_search(model: PreTrainedModel, config: PruningConfig) -> None:
    """Raise `ValueError` or `OSError` where a search would fail for the model or the request, before it is run."""
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} predicts no next token, and scope='search' compares what whole models predict. "
            f"Search with its causal counterpart and replay the plan, or use scope='global'."
        )


@torch.no_grad()
def search(
    subject: Subject,
    scores: Mapping[SiteKey, torch.Tensor],
    job: Job,
    calibration: Calibration,
    keep: KeepUnder,
) -> Found:
    """Move budget from the sites that bear it worst to those that bear it best, as long as the whole model gains.

    The search starts from the even share. In a deep model the first and last two layers stay unpruned at the start, if
    that is nearer to the dense model. A sweep narrows every site in turn by a step and measures how far that takes the
    whole pruned model, all other sites as narrow as they are and reconstructed, from the dense one: errors of sites
    accumulate in it, and all candidates are judged on the same tokens. With several processes each measures a share of
    the sites. Then all keep ratios are moved at once along the logarithm of what each saved unit of cost took; of
    three lengths of that move the best stays where it gains, else the step is halved. In a single process an interrupt
    (Ctrl-C) ends the search with the best so far.

    Args:
        subject (`Subject`): the dense model, which is not changed, with all its sites whose units may go.
        scores (mapping of site key to `Tensor[num_units]`): which units of a site stay longest.
        job (`Job`): the request, whose `search_windows` bounds the forward passes, its budget, and where the state is
            kept.
        calibration (`Calibration`): the tokens: every eighth window judges, the others reconstruct.
        keep (`Callable`): scores and a request in, what that request keeps under them out.

    Raises:
        ValueError: where nothing can move, or `search_windows` does not suffice for one sweep.
    """
    assert job.budget is not None
    sites, config, cost = subject.sites, job.config, job.budget.cost
    fixed = {site.key: scores[site.key] for site in sites}
    candidates = prunable_sites(sites, config)
    coarse, kept = _on_coarse_grid(candidates, fixed, config, keep)
    # A site that cannot be narrowed has nothing to be found.
    learned = [site for site in candidates if levels_of(site, scores[site.key], coarse)]
    if not learned:
        raise ValueError("scope='search' has no site that may be narrowed; see skip_layers and min_units_per_site.")
    variables = [Variables(site, 1, fewest_units(site, coarse) / site.num_units) for site in learned]
    budgets = budgets_of(variables, kept, coarse, exact=True, cost=cost)
    if all(len(budget.members) == 1 for budget in budgets):
        raise ValueError("scope='search' moves budget between sites, and only one of each kind is pruned here.")
    ratios = Ratios(learned, scores, lambda of_learned: keep(fixed | dict(of_learned), coarse))
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
                if (spared := _ends_spared(learned, fixed, coarse, keep)) is not None:
                    starts.append(spared)
                descent.start(state, starts)

            try:
                descent.run(state, price, config.search_windows, stage)
            except KeyboardInterrupt:
                if ranks.world_size() > 1:
                    # The others may be anywhere in their sweep.
                    raise
                logger.warning(
                    "The search was interrupted after %d sweeps and goes on with the best it has found.", state.sweeps
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
    """The request with MLP widths as coarse as its budget can be met with, and the even share under it."""
    multiple = coarse_multiple(sites, config)
    while multiple > config.multiple_of:
        coarse = replace(config, multiple_of=multiple)
        try:
            return coarse, keep(scores, coarse)
        except ValueError:
            # The last fraction of a grid step is needed, or what the request itself asks for is not to be had.
            multiple = multiple // config.multiple_of // 2 * config.multiple_of
    return config, keep(scores, config)


def _ends_spared(
    sites: Sequence[Site], scores: Mapping[SiteKey, torch.Tensor], coarse: PruningConfig, keep: KeepUnder
) -> torch.Tensor | None:
    """Keep ratios of the even share over all layers but the ends of a deep model, where that can meet the budget."""
    if coarse.skip_layers is not None or 1 + max(site.layer for site in sites) < FEWEST_WITH_ENDS:
        return None
    try:
        kept = keep(scores, replace(coarse, skip_layers=ENDS))
    except ValueError:
        return None
    return torch.tensor([len(kept[site.key]) / site.num_units for site in sites], dtype=torch.float64)


def _price(sites: Sequence[Site], layers: int) -> float:
    """Passes of one window through all layers that a sweep and its move take, at most."""
    # A site is measured from its layer to the last; a move that is made is passed through once more.
    return sum(layers - site.layer for site in sites) / layers + len(PARTS) + 1


def _as_many_as_allowed(
    judging: Calibration, sites: Sequence[Site], price: float, config: PruningConfig
) -> Calibration:
    """The windows to judge on: as many as leave `SWEEPS` sweeps, one at least.

    Raises:
        ValueError: where the request allows no sweep at all.
    """
    # Before the first sweep come the dense model, two to start from, and the better of them again.
    fewest = math.ceil(price) + 4
    if config.search_windows < fewest:
        raise ValueError(
            f"search_windows={config.search_windows} is too few to try {len(sites)} sites and {len(PARTS)} moves on "
            f"one window; give at least {fewest}, or use scope='global'."
        )
    allowed = int(config.search_windows / (SWEEPS * price + 4))
    return Calibration(*judging.windows(slice(max(1, allowed))), judging.source)
