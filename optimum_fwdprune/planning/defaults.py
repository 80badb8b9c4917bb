"""Defaults of a request that depend on the kinds of units that a model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ..architectures import Site
from ..request.budget_options import DEFAULT_EXPERT_METHOD, DEFAULT_METHOD
from ..request.choices import UnitKind
from ..request.config import PruningConfig
from ..request.options import Options
from ..request.registry import get_method
from ..runs.loggers import get_logger


logger = get_logger(__name__)


def with_default_kinds(config: PruningConfig, sites: Iterable[Site]) -> PruningConfig:
    """Return a request with the kinds that are the default for a model: experts of a mixture instead of MLP channels.

    The change is logged. The default method, which does not score experts, is replaced by the default for experts.

    Args:
        config (`PruningConfig`): the request.
        sites (iterable of `Site`): the sites of the model.

    Raises:
        ValueError: where the request names another method, and that does not score experts.
    """
    has_experts = any(site.routing is not None for site in sites)
    if not has_experts or config.kinds is not None or config.resolved_kinds != [UnitKind.MLP]:
        return config
    kinds: list[str] = [UnitKind.EXPERT.value]
    if config.method != DEFAULT_METHOD:
        changed = dataclasses.replace(config, kinds=kinds)
    else:
        shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(Options)}
        shared |= {"kinds": kinds, "method": DEFAULT_EXPERT_METHOD}
        changed = get_method(DEFAULT_EXPERT_METHOD).config_class(**shared)
    logger.warning(
        "This model is a mixture of experts, so that experts are pruned: kinds=%s, method=%r. Set kinds to choose "
        "yourself what is pruned.",
        kinds,
        changed.method,
    )
    return changed
