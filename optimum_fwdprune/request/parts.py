"""The requests for scores into which a request for units of several kinds is divided, one for every method."""

from __future__ import annotations

import dataclasses
from typing import Any

from .budget_options import LIMITS, TARGETS
from .choices import UnitKind
from .options import Options
from .registry import get_method


# Options that refer to the whole request. Those of a method that scores a part of the units are set for it.
_OF_ALL_KINDS = (
    *("depth_sparsity", "depth_method", "expert_sparsity", "expert_method"),
    *("attention_sparsity", "mlp_sparsity", "scope"),
    *TARGETS,
    *LIMITS,
)


def requests_for_scores(config: Any) -> dict[str, Any]:
    """Return the requests for the scores of the units of a request, by the name of what they score: `"units"` for
    heads and channels, `"experts"`, and `"depth"` for layers or sublayers.

    A request for units that one method scores is its own, and the only one.

    Args:
        config (`PruningConfig`): the request.
    """
    requests: dict[str, Any] = {}
    if config.width_kinds:
        requests["units"] = _of_widths(config)
    if config.prunes_experts:
        share = config.sparsity if config.expert_sparsity is None else config.expert_sparsity
        requests["experts"] = _of_kind(config, UnitKind.EXPERT, config.resolved_expert_method, share)
    if config.depth_kind is not None:
        # Where their number is open, their order matters up to what the budget could take.
        share = config.sparsity if config.depth_is_open else config.share_of_depth
        requests["depth"] = _of_kind(config, config.depth_kind, config.resolved_depth_method, share)
    return dict.fromkeys(requests, config) if len(requests) == 1 else requests


def _of_widths(config: Any) -> Any:
    """Return the request for the scores of heads and channels: the request without its other kinds."""
    without = dict.fromkeys(("depth_sparsity", "depth_method", "expert_sparsity", "expert_method"))
    return dataclasses.replace(config, kinds=config.width_kinds, **without)


def _of_kind(config: Any, kind: str, method: str, sparsity: float) -> Any:
    """Return a request for the scores of one kind by a method, which is of the method's class."""
    shared = {declared.name: getattr(config, declared.name) for declared in dataclasses.fields(Options)}
    shared |= dict.fromkeys(_OF_ALL_KINDS)
    return get_method(method).config_class(**{**shared, "method": method, "kinds": [str(kind)], "sparsity": sparsity})
