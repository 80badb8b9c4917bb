"""How scores and a budget become a plan: by allocation, or by a search over whole models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ..allocation.composing import EARLIER
from ..allocation.job import Job
from ..allocation.losses import ROUTING
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
    """Return a function that returns the units which a request would keep by the scores of its method."""
    assert job.budget is not None
    config, budget, additive = job.config, job.budget, get_method(job.config.method).is_additive(job.config)
    return lambda scores: rounds.keep(sites, scores, config, budget, additive)


def make_plan(subject: Subject, scores: Scores, rounds: Rounds, job: Job) -> tuple[PruningPlan, Scores]:
    """Return the plan of a round, and the scores, which include the history of a search if there was one.

    Args:
        subject (`Subject`): the model before the round, in eval mode, with all its sites; it is not changed.
        scores (`Scores`): the units' scores; for a search, with the calibration tokens.
        rounds (`Rounds`): the rounds of the request, which allocate the budget.
        job (`Job`): the request of the round, its budget, and the folder of a search's state.
    """
    model, sites, config = subject.model, subject.sites, job.config
    if config.resolved_scope == Scope.SEARCH:
        budget, calibration = job.budget, scores.calibration
        assert budget is not None and calibration is not None

        def keep(values: Mapping[SiteKey, torch.Tensor], request: PruningConfig) -> dict[SiteKey, list[int]]:
            return rounds.keep(sites, values, request, budget, additive=False)

        searched = search(subject.looking_at(rounds.open_sites(sites)), scores.values, job, calibration, keep)
        kept = keep(searched.scores, searched.config)
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
    """Return a plan to replay, whose metadata describe the reconstruction of this run and not of the original one.

    A warning is logged where the original run reconstructed weights and this one does not.

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
            "The plan was made by a run with reconstruction=%r, but a plan holds no weights: the kept units have the "
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
    """Return the request to record for a replay: the options of `config` that have an effect with a plan."""
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
        **_routing(scores),
        "calibration": scores.calibrated_on or None,
        "seed": config.seed,
        "versions": _versions(),
    }


def _routing(scores: Scores) -> dict[str, Any]:
    """Return how many calibration tokens the routers of the dense model send to every expert, if this was counted."""
    routed = {
        str(key): [int(number) for number in statistics.routed.tolist()]
        for key, statistics in scores.statistics.items()
        if statistics.routed is not None
    }
    return {ROUTING: routed} if routed else {}
