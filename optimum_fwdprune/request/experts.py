"""Requests for experts: the checks of their options."""

from __future__ import annotations

from .choices import ReconstructionKind, Scope
from .options import Options


def check_experts(config: Options) -> None:
    """Raise `ValueError` where a request for experts has options or kinds that cannot be combined with them."""
    if not config.prunes_experts:
        return
    others = [kind for kind in dict.fromkeys(config.resolved_kinds) if kind not in config.unit_kinds]
    if others:
        raise ValueError(
            f"kinds={config.resolved_kinds} includes expert and other kinds, which are pruned one after the other: "
            f"prune kinds=['expert'] first, and kinds={others} with a second call."
        )
    refused = {
        f"scope={config.scope!r}": (
            config.scope not in (None, Scope.LAYER),
            "every layer keeps the same number of experts; leave out scope",
        ),
        f"skip_layers={config.skip_layers}": (
            bool(config.skip_layers),
            "every layer keeps the same number of experts; leave out skip_layers",
        ),
        f"rounds={config.rounds}": (config.rounds > 1, "leave out rounds, or prune experts with several calls"),
        "target_speedup": (config.target_speedup is not None, "set sparsity or target_parameters instead"),
        **dict.fromkeys(
            config.limits_of_quality,
            (True, "sizes of experts are not tried one after the other; set sparsity or target_parameters instead"),
        ),
        "target_active_parameters": (
            config.target_active_parameters is not None,
            "a token uses as many experts as before; set target_parameters, or prune attention, layers or sublayers",
        ),
        f"reconstruction={config.reconstruction!r}": (
            config.reconstruction == ReconstructionKind.BIAS,
            "a bias cannot replace an expert, whose tokens go to other experts; use 'least_squares' or 'none'",
        ),
        "refit_sources": (config.refit_sources, "leave it out"),
    }
    for name in config.limits_of_quality:
        refused[name] = (True, "set sparsity or target_parameters instead")
    for option, (asked, way_out) in refused.items():
        if asked:
            raise ValueError(f"{option} cannot be combined with 'expert' in kinds: {way_out}.")
