"""Scoring every unit; the statistics for scores and reconstructions are collected in one pass over the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..allocation.constraints import prunable_sites
from ..allocation.job import Job
from ..architectures import Site, SiteKey, keyed_by_site
from ..data.amount import with_number
from ..data.calibration import Calibration
from ..forward.evidence import Evidence
from ..forward.gathering import gather_statistics
from ..forward.statistics import PlacedStatistics
from ..loading.offloading import InTurn, is_offloaded
from ..loading.subject import Subject
from ..reconstruction.independent import grams_fit, statistics_with_grams
from ..reconstruction.kinds import STATISTICS_OF
from ..request.choices import ReconstructionKind, ReconstructionOrder
from ..request.parts import requests_for_scores
from ..request.registry import Method
from ..runs.resume import Resume, State
from .methods import (
    PruningConfig,
    ScoringInputs,
    UnitScores,
    get_method,
)
from .scored import scored_sites, scored_units
from .scores import Scores


def needs_calibration(config: PruningConfig) -> bool:
    """Return whether the request's scores or its reconstruction need calibration tokens."""
    return bool(_needed(config)) or any(method.calibrated for method in _methods(config))


def check_scoring(model: PreTrainedModel, config: PruningConfig) -> None:
    """Raise `ValueError` where the request's method cannot score `model`; it is called before anything is measured."""
    if is_offloaded(model) and get_method(config.method).differentiates(config):
        raise ValueError(
            f"method={config.method!r} back-propagates with these options, which is impossible with offloaded "
            f"weights. Load the model without offloading, or use method='mini_llm' with gradient='zeroth_order', "
            f"which runs forward passes."
        )


def gather_evidence(
    subject: Subject, requests: Sequence[PruningConfig], calibration: Calibration | None, resume: Resume
) -> Evidence:
    """Return the tokens with all statistics that the scores and reconstructions of requests need, without changing the
    model.

    Args:
        subject (`Subject`): the dense model, in eval mode, with all its sites.
        requests (sequence of `PruningConfig`): settled requests with the same calibration.
        calibration (`Calibration`, *optional*): the tokens, required if a request `needs_calibration`.
        resume (`Resume`): the folder for sums so far.

    Raises:
        ValueError: where weights or activations contain NaN or infinity; the message names the place.
    """
    _check_finite(subject.model)
    needed = set[str]().union(*map(_needed, requests))
    if not needed or calibration is None:
        return Evidence(calibration)
    batch_size = requests[0].batch_size
    wanted = [scored_sites(subject, request) for request in requests]
    keys = {site.key for sites in wanted for site in sites}
    refitted = _refitted_sites(subject, requests)
    keys |= {site.key for site in refitted}
    measured = subject.looking_at(site for site in subject.sites if site.key in keys)
    if refitted and all(site.routing is None for site in measured.sites) and grams_fit(refitted):
        return Evidence(
            calibration, *statistics_with_grams(measured, calibration, batch_size, needed, refitted, resume)
        )
    (statistics,) = gather_statistics(measured, [calibration], batch_size, needed, resume)
    return Evidence(calibration, statistics)


def score_units(
    subject: Subject,
    job: Job,
    evidence: Evidence,
    keep: Callable[[Mapping[SiteKey, torch.Tensor]], dict[SiteKey, list[int]]],
) -> Scores:
    """Score every unit, without changing the model.

    Args:
        subject (`Subject`): the dense model, in eval mode, with all its sites.
        job (`Job`): the request, and the folder for states of long stages.
        evidence (`Evidence`): the tokens and statistics that the request needs; see [`gather_evidence`].
        keep (`Callable`): returns the units that the request would keep, from scores of every unit.

    Raises:
        ValueError: where scores contain NaN or infinity; the message names the place.
    """
    model, config, resume = subject.model, job.config, job.resume
    calibration = evidence.calibration
    # Layers and sublayers are scored by all of their sites.
    sites = scored_sites(subject, config)
    # Scores are stored for resuming, since units of equal score could change places on another device.
    stage = resume.stage("scores", calibration)
    scored = stage.load(_scores_of)
    if scored is None:
        placed = PlacedStatistics(sites, evidence.statistics)

        def keep_in_memory(scores: Mapping[SiteKey, torch.Tensor]) -> dict[SiteKey, list[int]]:
            return keep({key: values.cpu() for key, values in scores.items()})

        def scored_for(request: PruningConfig) -> UnitScores:
            of_request = scored_sites(subject, request)
            inputs = ScoringInputs(model, InTurn(of_request), placed, calibration, request, keep_in_memory, resume)
            return _in_memory(get_method(request.method).score(inputs))

        requests = requests_for_scores(config)
        # The first ones are those of the request's own method.
        first, *others = requests
        scored = scored_for(requests[first])
        for name in others:
            part = scored_for(requests[name])
            details = scored.details | {name: part.details} if part.details else scored.details
            scored = replace(scored, values={**scored.values, **part.values}, details=details)
        _check_scores(scored, subject.sites, config)
        stage.save(lambda: _state_of(scored))
    return Scores(
        with_number(config, None if calibration is None else len(calibration)),
        dict(scored.values),
        dict(evidence.statistics),
        calibration,
        standard_errors=dict(scored.standard_errors),
        details=scored.details,
        history=dict(scored.history),
        grams=evidence.grams,
        dense_stream=evidence.dense_stream,
        model_type=subject.architecture.model_type,
    )


def _in_memory(scored: UnitScores | Mapping[SiteKey, torch.Tensor]) -> UnitScores:
    scored = scored if isinstance(scored, UnitScores) else UnitScores(scored)
    values, errors = (
        {key: value.detach().float().cpu() for key, value in keyed_by_site(values).items()}
        for values in (scored.values, scored.standard_errors)
    )
    return replace(scored, values=values, standard_errors=errors)


def _check_scores(scored: UnitScores, sites: Iterable[Site], config: PruningConfig) -> None:
    values = scored.values
    for key, (count, what) in scored_units(sites, config).items():
        if key not in values or values[key].shape != (count,):
            raise ValueError(f"Method {config.method!r} must score {count} units for the {what}.")
        if not values[key].isfinite().all():
            raise ValueError(f"Method {config.method!r} scored NaN or infinity in the {what}.")


def _state_of(scored: UnitScores) -> State:
    tensors = {f"scores.{key}": value for key, value in scored.values.items()}
    tensors |= {f"errors.{key}": value for key, value in scored.standard_errors.items()}
    tensors |= {f"history.{name}": values for name, values in scored.history.items()}
    return tensors, {"details": scored.details}


def _scores_of(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> UnitScores:
    def of_sites(group: str) -> dict[SiteKey, torch.Tensor]:
        keys = (SiteKey.parse(name.removeprefix(f"{group}.")) for name in tensors if name.startswith(f"{group}."))
        return {key: tensors[f"{group}.{key}"] for key in keys}

    history = {
        name.removeprefix("history."): values for name, values in tensors.items() if name.startswith("history.")
    }
    return UnitScores(of_sites("scores"), of_sites("errors"), numbers["details"], history)


def _refitted_sites(subject: Subject, requests: Sequence[PruningConfig]) -> list[Site]:
    """Return the sites that independent least squares may refit for any of the requests, which are settled."""
    keys: set[SiteKey] = set()
    for config in requests:
        least_squares = config.reconstruction == ReconstructionKind.LEAST_SQUARES
        if least_squares and config.reconstruction_order == ReconstructionOrder.INDEPENDENT:
            # Any site may take over the output of removed layers and sublayers after it.
            may_refit = subject.sites if config.depth_kind else prunable_sites(subject.sites, config)
            keys |= {site.key for site in may_refit}
    return [site for site in subject.sites if site.key in keys]


def _needed(config: PruningConfig) -> set[str]:
    of_methods = (statistics for method in _methods(config) for statistics in method.statistics)
    return {*of_methods, *STATISTICS_OF[config.reconstruction]}


def _methods(config: PruningConfig) -> list[Method]:
    """Return the methods that score the units of a request."""
    return [get_method(request.method) for request in requests_for_scores(config).values()]


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        # amax propagates NaN and infinity and, unlike a sum, cannot overflow.
        if not parameter.is_meta and not parameter.detach().abs().amax().isfinite():
            raise ValueError(f"{name} contains NaN or infinity; the checkpoint is damaged or overflowed in its dtype.")
