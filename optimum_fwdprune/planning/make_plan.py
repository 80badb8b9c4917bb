"""Scores and a budget turned into a plan: by allocation, or by a search over whole models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ..allocation.composing import EARLIER
from ..allocation.job import Job
from ..allocation.plan import PruningPlan
from ..allocation.rounds import Rounds
from ..architectures import Site, SiteKey
from ..loading.subject import Subject
from ..request.choices import ReconstructionKind, Scope
from ..request.config import UNDECIDED_BY_PLANS, PruningConfig
from ..request.registry import get_method
from ..runs.loggers import get_logger
from ..scoring.scores import Scores
from ..version import __version__
from ..words import public_name
from .search import search


logger = get_logger(__name__)

Keep = Callable[[Mapping[SiteKey, torch.Tensor]], dict[SiteKey, list[int]]]


def keeper(rounds: Rounds, sites: list[Site], job: Job) -> Keep:
    """Return the function that turns scores of a request's method into the units that the request would keep."""
    assert job.budget is not None
    config, budget, additive = job.config, job.budget, get_method(job.config.method).is_additive(job.config)
    return lambda scores: rounds.keep(sites, scores, config, budget, additive)


def make_plan(subject: Subject, scores: Scores, rounds: Rounds, job: Job) -> tuple[PruningPlan, Scores]:
    """Return the plan of a round, and the scores with the history of a search where there was one.

    Args:
        subject (`Subject`): the model before the round, in eval mode, with all its sites; it is not changed.
        scores (`Scores`): of their units; with the tokens that a search passes through the model.
        rounds (`Rounds`): what allocates.
        job (`Job`): the request of the round, what it removes, and where a search keeps its state.
    """
    model, sites, config = subject.model, subject.sites, job.config
    if config.resolved_scope == Scope.SEARCH:
        budget, calibration = job.budget, scores.calibration
        assert budget is not None and calibration is not None

        def keep(values: Mapping[SiteKey, torch.Tensor], request: PruningConfig) -> dict[SiteKey, list[int]]:
            return rounds.keep(sites, values, request, budget, additive=False)

        searched = search(subject.looking_at(rounds.open_sites(sites)), scores.values, job, calibration, keep)
        kept = keep(searched.scores, config)
        details = {**scores.details, "search": searched.details}
        scores = dataclasses.replace(scores, details=details, history=searched.history)
    else:
        kept = keeper(rounds, sites, job)(scores.values)
    plan = PruningPlan(
        kept=kept,
        num_units={site.key: site.num_units for site in sites},
        model_type=model.config.model_type,
        attention_unit=config.attention_unit,
        metadata=_metadata(model, scores, rounds, config),
    )
    return plan, scores


def replayed(plan: PruningPlan, config: PruningConfig) -> PruningPlan:
    """Return a plan that is about to be replayed, with a record of what this run does to the weights, and not of what
    the run that made it did. Warns where that run reconstructed weights and this one does not.

    Args:
        plan (`PruningPlan`): the plan.
        config (`PruningConfig`): the request of the replay, with its reconstruction.
    """
    before = [*plan.metadata.get(EARLIER, []), plan.metadata]
    kinds = (run.get("reconstruction") for run in reversed(before))
    lost = next((kind for kind in kinds if kind not in (None, ReconstructionKind.NONE)), None)
    if lost is not None and config.reconstruction == ReconstructionKind.NONE:
        text = (plan.metadata.get("calibration") or {}).get("source")
        logger.warning(
            "The plan is of a run with reconstruction=%r, and a plan holds no weights: the units that stay keep the "
            "weights of this model. Pass reconstruction=%r with the same calibration data%s to reconstruct them.",
            lost,
            lost,
            f" ({text})" if text else "",
        )
    metadata = {name: value for name, value in plan.metadata.items() if name not in ("reconstructed", EARLIER)}
    return dataclasses.replace(
        plan,
        metadata={**metadata, "reconstruction": config.reconstruction, "versions": _versions(), "replayed": True},
    )


def request_of_replay(plan: PruningPlan, config: PruningConfig) -> PruningConfig:
    """Return what a replay records as its request: of `config` the options that a plan leaves open."""
    open_options = {name: getattr(config, name) for name in UNDECIDED_BY_PLANS}
    return PruningConfig(attention_unit=plan.attention_unit, **open_options)


def _versions() -> dict[str, str]:
    return {"optimum_fwdprune": __version__, "transformers": transformers_version, "torch": torch.__version__}


def _metadata(model: PreTrainedModel, scores: Scores, rounds: Rounds, config: PruningConfig) -> dict[str, Any]:
    return {
        "source": public_name(model.config._name_or_path),
        "method": config.method,
        "reconstruction": config.reconstruction,
        "requested_sparsity": rounds.requested_sparsity,
        "rounds": config.rounds,
        "scores": {
            str(key): {
                "lowest": float(value.min()),
                "mean": float(value.mean()),
                "highest": float(value.max()),
            }
            for key, value in scores.values.items()
        },
        "scoring": scores.details,
        "calibration": scores.calibrated_on or None,
        "seed": config.seed,
        "versions": _versions(),
    }
