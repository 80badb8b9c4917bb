"""Requests for experts: the checks of their options."""

from __future__ import annotations

from .choices import ReconstructionKind, Scope
from .options import Options
from .registry import METHODS


def check_experts(config: Options) -> None:
    """Raise `ValueError` where a request for experts has options that cannot be combined with them, or another request
    has options for experts."""
    _check_addition(config)
    if not config.prunes_experts:
        return
    learns = config.method in METHODS and METHODS[config.method].learns_split and len(set(config.resolved_kinds)) > 1
    refused = {
        f"scope={config.scope!r}": (
            config.scope == Scope.SEARCH or (config.scope == Scope.GLOBAL and not config.width_kinds),
            "every layer keeps the same number of experts; leave out scope",
        ),
        f"skip_layers={config.skip_layers}": (
            bool(config.skip_layers),
            "every layer keeps the same number of experts; leave out skip_layers",
        ),
        f"rounds={config.rounds}": (config.rounds > 1, "leave out rounds, or prune experts with several calls"),
        f"method={config.method!r}": (learns, "use a method that does not learn how the budget is split"),
        "target_speedup": (config.target_speedup is not None, "set sparsity or target_parameters instead"),
        "target_active_parameters": (
            config.target_active_parameters is not None and config.expert_sparsity is None,
            "a token uses as many experts as before. Set target_parameters, or expert_sparsity in addition to "
            "'attention', 'layer' or 'sublayer' in kinds, which lose the active parameters",
        ),
        f"reconstruction={config.reconstruction!r}": (
            config.reconstruction == ReconstructionKind.BIAS,
            "a bias cannot replace an expert, whose tokens go to other experts; use 'least_squares' or 'none'",
        ),
        "refit_sources": (config.refit_sources, "leave it out"),
    }
    for option, (asked, way_out) in refused.items():
        if asked:
            raise ValueError(f"{option} cannot be combined with 'expert' in kinds: {way_out}.")


def _check_addition(config: Options) -> None:
    """Raise `ValueError` where a request has options for experts in addition to other units, and not both of them."""
    kinds = list(dict.fromkeys(config.resolved_kinds))
    has_others = {"expert_sparsity": len(kinds) > 1, "expert_method": bool(config.width_kinds)}
    names = {"expert_sparsity": "other units", "expert_method": "heads or channels"}
    for name, others in has_others.items():
        if getattr(config, name) is not None and not (config.prunes_experts and others):
            raise ValueError(
                f"{name} is for experts in addition to {names[name]}, and the request has kinds={kinds}. Use "
                f"{name.removeprefix('expert_')}, or add the others to kinds."
            )
    if config.expert_sparsity is not None and config.limits_of_quality:
        (limit,) = config.limits_of_quality
        raise ValueError(f"{limit} and expert_sparsity are two budgets; set one of them.")
