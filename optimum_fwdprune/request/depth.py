"""Requests for layers and sublayers: the checks of their options."""

from __future__ import annotations

from .choices import DepthKind, Scope, UnitKind
from .options import Options
from .registry import METHODS, get_method


def check_depth(config: Options) -> None:
    """Raise `ValueError` where options of a request for layers or sublayers contradict each other."""
    kinds = list(dict.fromkeys(config.resolved_kinds))
    if all(kind in kinds for kind in DepthKind):
        raise ValueError(
            "kinds includes layer and sublayer, and a layer is two sublayers. Use sublayer alone to remove either."
        )
    _check_methods(config)
    only_widths = {"depth_sparsity": config.depth_sparsity, "depth_method": config.depth_method}
    if config.depth_kind is None or not config.unit_kinds:
        for name, value in only_widths.items():
            if value is not None:
                raise ValueError(
                    f"{name} is for layers or sublayers in addition to heads, channels or experts, and the request "
                    f"has kinds={kinds}. Use {name.removeprefix('depth_')}, or add the others to kinds."
                )
    elif config.depth_sparsity is None and config.scope != Scope.SEARCH and not config.has_target:
        others, way_out = "heads or channels", "scope='search' to let a search decide"
        if config.prunes_experts:
            others, way_out = "other units", "a target such as target_parameters"
        raise ValueError(
            f"kinds={kinds} removes {config.depth_kind}s in addition to {others}. Set depth_sparsity to the fraction "
            f"of the {config.depth_kind}s to remove, or {way_out}."
        )
    if config.depth_sparsity is not None and not 0 <= config.depth_sparsity < 1:
        raise ValueError(
            f"depth_sparsity must be in [0, 1); got {config.depth_sparsity}. It is the fraction of the "
            f"{config.depth_kind}s to remove."
        )
    if config.depth_kind is not None:
        _check_limits(config)


def _check_methods(config: Options) -> None:
    """Raise `ValueError` where a method does not score the kinds of the request."""
    experts = [UnitKind.EXPERT.value] if config.prunes_experts else []
    asked = [("method", config.method, kind) for kind in config.width_kinds or experts or config.resolved_kinds]
    if config.width_kinds and config.prunes_experts:
        get_method(config.resolved_expert_method)
        asked.append(("expert_method", config.resolved_expert_method, UnitKind.EXPERT))
    if config.depth_kind is not None and config.unit_kinds:
        get_method(config.resolved_depth_method)
        asked.append(("depth_method", config.resolved_depth_method, config.depth_kind))
    for field, name, kind in asked:
        if name in METHODS and kind not in METHODS[name].kinds:
            able = [other for other, method in sorted(METHODS.items()) if kind in method.kinds]
            raise ValueError(
                f"{field}={name!r} scores {', '.join(METHODS[name].kinds)} and not {kind}, which "
                f"kinds={config.resolved_kinds} includes. These do: {', '.join(able)}."
            )


def _check_limits(config: Options) -> None:
    """Raise `ValueError` where a request for layers or sublayers has options that cannot be combined with them."""
    kind = config.depth_kind
    alone = not config.width_kinds
    learns = config.method in METHODS and METHODS[config.method].learns_split and bool(config.unit_kinds)
    refused = {
        f"scope={config.scope!r}": (
            alone and config.scope is not None,
            "scope divides heads and channels; leave it out, and let method='removal_loss' search among them"
            if config.scope == Scope.SEARCH
            else "scope divides heads and channels; leave it out",
        ),
        f"method={config.method!r}": (
            learns,
            "use a method that does not learn how the budget is split",
        ),
        config.alike_by: (
            config.cuts_alike and kind == DepthKind.SUBLAYER,
            "it leaves attention and MLP in every layer; use 'layer' instead of 'sublayer', or leave it out",
        ),
    }
    for option, (asked, way_out) in refused.items():
        if asked:
            raise ValueError(f"{option} cannot be combined with {kind!r} in kinds: {way_out}.")
