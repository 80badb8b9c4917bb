"""Requests for layers and sublayers: the checks of their options, and the request for their scores."""

from __future__ import annotations

import dataclasses
from typing import Any

from .budget_options import LIMITS, TARGETS
from .choices import DepthKind, Scope
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
    if config.depth_kind is None or not config.width_kinds:
        for name, value in only_widths.items():
            if value is not None:
                raise ValueError(
                    f"{name} is for layers or sublayers in addition to heads or channels, and the request has "
                    f"kinds={kinds}. Use {name.removeprefix('depth_')}, or add the others to kinds."
                )
    elif config.depth_sparsity is None and config.scope != Scope.SEARCH and not config.has_target:
        raise ValueError(
            f"kinds={kinds} removes {config.depth_kind}s in addition to heads or channels. Set depth_sparsity to the "
            f"fraction of the {config.depth_kind}s to remove, or scope='search' to let a search decide."
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
    asked = [("method", config.method, kind) for kind in config.width_kinds or config.resolved_kinds]
    if config.depth_kind is not None and config.width_kinds:
        get_method(config.resolved_depth_method)
        asked.append(("depth_method", config.resolved_depth_method, config.depth_kind))
    for field, name, kind in asked:
        if name in METHODS and kind not in METHODS[name].kinds:
            able = [repr(other) for other, method in sorted(METHODS.items()) if kind in method.kinds]
            raise ValueError(
                f"{field}={name!r} scores {', '.join(METHODS[name].kinds)} and not {kind}, which "
                f"kinds={config.resolved_kinds} includes. Use {field}={' or '.join(able)}."
            )


def _check_limits(config: Options) -> None:
    """Raise `ValueError` where a request for layers or sublayers has options that cannot be combined with them."""
    kind = config.depth_kind
    alone = not config.width_kinds
    learns = config.method in METHODS and METHODS[config.method].learns_split
    refused = {
        f"scope={config.scope!r}": (
            alone and config.scope is not None,
            "scope divides heads and channels; leave it out, and let method='removal_loss' search among them"
            if config.scope == Scope.SEARCH
            else "scope divides heads and channels; leave it out",
        ),
        f"method={config.method!r}": (
            not alone and learns,
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


def depth_request(config: Any) -> Any:
    """Return the request for the scores of layers or sublayers: the request itself if it has no other kinds, and
    otherwise a request for these alone with its `depth_method`. Both are of the class `PruningConfig`."""
    if not config.width_kinds:
        return config
    config_class = get_method(config.resolved_depth_method).config_class
    shared = {declared.name: getattr(config, declared.name) for declared in dataclasses.fields(Options)}
    for name in ("depth_sparsity", "depth_method", "attention_sparsity", "mlp_sparsity", "scope", *TARGETS, *LIMITS):
        shared[name] = None
    return config_class(
        **{
            **shared,
            "method": config.resolved_depth_method,
            "kinds": [config.depth_kind],
            # Where their number is open, their order matters up to what the budget could take.
            "sparsity": config.sparsity if config.depth_is_open else config.share_of_depth,
        }
    )


def width_request(config: Any) -> Any:
    """Return the request for the scores of heads and channels: the request without its layers or sublayers."""
    if config.depth_kind is None:
        return config
    return dataclasses.replace(config, kinds=config.width_kinds, depth_sparsity=None, depth_method=None)
