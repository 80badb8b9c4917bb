"""The checks of a request that are made before anything is measured.

A check is defined in the module of the stage that it protects. All of them are called here.
"""

from __future__ import annotations

from typing import Any

from ..allocation.fitting import check_fits, check_without_layers
from ..allocation.plan import PruningPlan
from ..architectures.site import unit_name
from ..cutting.verification import check_counterpart
from ..forward.losses import check_predicts
from ..loading.placement import warn_of_placement
from ..loading.saving import check_savable
from ..loading.subject import Subject
from ..reconstruction.reconstruct import check_reconstruction
from ..request.choices import DepthKind, ReconstructionKind, Scope, UnitKind
from ..request.config import PruningConfig
from ..runs import ranks
from ..scoring.scores import Scores
from .search import check_search


def check_arguments(plan: Any, scores: Any) -> None:
    """Raise `TypeError` where a plan or scores have another type, and `ValueError` where both are passed."""
    if plan is not None and scores is not None:
        raise ValueError("Pass a plan to replay or scores to allocate by, not both.")
    for name, value, expected in (("plan", plan, PruningPlan), ("scores", scores, Scores)):
        if value is not None and not isinstance(value, expected):
            raise TypeError(
                f"{name} must be a {expected.__name__}; got a {type(value).__name__}. "
                f"{expected.__name__}.load(file) reads a file."
            )


def check_model(subject: Subject) -> None:
    """Raise `ValueError` where a model does not fit its class and config; warn of an unfavourable placement."""
    warn_of_placement(subject.model)
    check_counterpart(subject)


def check_request(
    subject: Subject, config: PruningConfig, plan: PruningPlan | None = None, scores: Scores | None = None
) -> None:
    """Raise an error where a model cannot be pruned by a request.

    Args:
        subject (`Subject`): the model with all its sites.
        config (`PruningConfig`): the request.
        plan (`PruningPlan`, *optional*): plan to replay.
        scores (`Scores`, *optional*): scores to allocate by.

    Raises:
        ValueError: where the request does not fit the model; the message names the way out.
    """
    if subject.streamed:
        check_streamable(config)
        # The pruned model is written during the run.
        check_savable(subject.model, None)
    check_reconstruction(subject.model, config)
    if config.prunes_experts:
        check_refittable(subject, config)
    if plan is None:
        check_kinds(subject, config)
    else:
        check_fits(plan, subject)
    if plan is None and config.depth_kind is not None:
        # The check is the same for all layers.
        check_without_layers(subject.model, range(len(subject.layers) - 1))
    if plan is None and config.resolved_scope == Scope.SEARCH:
        check_search(subject.model, config)
    check_model(subject)
    if scores is not None and config.limits_of_quality:
        (limit,) = config.limits_of_quality
        raise ValueError(
            f"{limit} measures on calibration windows that are held out, which scores made before may be based on. "
            f"Leave scores out."
        )
    if config.limits_of_quality:
        check_predicts(subject.model)
    if scores is not None:
        scores.check_matches(subject.sites, config, subject.architecture.model_type)


def check_kinds(subject: Subject, config: PruningConfig) -> None:
    """Raise `ValueError` where a request prunes units of a kind that the model cannot lose."""
    present = {site.kind for site in subject.sites}
    for kind in config.resolved_kinds:
        if kind in list(UnitKind) and kind not in present:
            units = unit_name(kind, config.attention_unit)
            others = [other for other in present if not _fixed(subject, other)]
            raise ValueError(
                f"kinds={config.resolved_kinds} asks for {units}, which this {subject.model.config.model_type} does "
                f"not have{_why_missing(kind)}. Use kinds={sorted(others) or [DepthKind.LAYER.value]}."
            )
    for site in subject.sites:
        if site.fixed and site.kind in config.resolved_kinds:
            others = [kind for kind in config.resolved_kinds if kind != site.kind] or [
                kind for kind in present if not _fixed(subject, kind)
            ]
            raise ValueError(
                f"kinds={config.resolved_kinds} asks for {unit_name(site.kind, config.attention_unit)}, which this "
                f"{subject.model.config.model_type} cannot lose: {site.fixed} Use kinds={others}."
            )


def check_refittable(subject: Subject, config: PruningConfig) -> None:
    """Raise `ValueError` where a request refits experts that are not built like those of transformers."""
    for site in subject.sites:
        if site.routing is None or site.routing.can_be_refitted or config.reconstruction == ReconstructionKind.NONE:
            continue
        raise ValueError(
            f"The {site} cannot be refitted: {type(site.routing.experts).__name__} does not compute them as the "
            f"experts of transformers do. Set reconstruction='none'."
        )


def _fixed(subject: Subject, kind: str) -> bool:
    """Return whether no single unit of a kind can be removed."""
    return any(site.fixed for site in subject.sites if site.kind == kind)


def _why_missing(kind: str) -> str:
    reasons: dict[str, str] = {
        UnitKind.MLP: ": its layers have experts, whose channels must be equally many in all experts",
        UnitKind.EXPERT: ": its layers have one MLP each, and no mixture of experts",
    }
    return reasons.get(kind, "")


def check_streamable(config: PruningConfig) -> None:
    """Raise `ValueError` where a request needs more than one layer of the model in memory at a time."""
    if ranks.world_size() > 1:
        raise ValueError(
            f"low_memory=True runs in one process, and this is one of {ranks.world_size()}: start it without "
            f"accelerate launch, or leave low_memory out."
        )
    runs_whole_models = {
        "scope='search'": config.resolved_scope == Scope.SEARCH,
        f"rounds={config.rounds}": config.rounds > 1,
        "target_speedup": config.target_speedup is not None,
        **dict.fromkeys(config.limits_of_quality, True),
    }
    for name, is_set in runs_whole_models.items():
        if is_set:
            raise ValueError(
                f"{name} runs whole models, and low_memory=True has one decoder layer in memory at a time. Leave one "
                f"of them out."
            )
