"""Checks of the options of a request, by themselves and together."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Collection
from typing import Any

from ..words import did_you_mean, name_and_weight
from .budget_options import COUNTS, LIMITS, SIZES, TARGETS
from .choices import WIDTH_KINDS, ReconstructionKind, ReconstructionOrder, ReconstructionTarget, Scope
from .depth import check_depth
from .experts import check_experts
from .fields import AUTO, field_type, may_be_auto
from .options import Options
from .registry import METHODS
from .sizes import bytes_of, count_of
from .speed import shares_of_phases


_AT_LEAST_ONE = (
    "search_windows",
    "rounds",
    "latency_tokens",
    "context_tokens",
    "serving_batch",
    "latency_context",
    "n_samples",
    "seq_len",
    "batch_size",
    "multiple_of",
    "tensor_parallel",
    "min_units_per_site",
)

# Types of values that an annotation accepts; numbers of numpy and other libraries count as numbers.
_ACCEPTED = {str: str, bool: bool, int: numbers.Integral, float: numbers.Real}


def check_types(config: Options) -> None:
    """Convert every option to the type that it is annotated with; raise `ValueError` where its type is another."""
    config_class: Any = type(config)
    for name, hint in _hints(config_class).items():
        kind, is_list, is_optional = field_type(hint)
        value = getattr(config, name)
        if name in SIZES and isinstance(value, str):
            value = bytes_of(value)
        elif name in COUNTS and isinstance(value, str):
            # Where it is no number, the error below says what is wanted.
            value = value if count_of(value) is None else count_of(value)
        is_word = may_be_auto(hint) and value == AUTO
        if kind not in _ACCEPTED or (is_optional and value is None) or is_word:
            continue
        # Where the annotation allows one name in the place of a list, a list of one is the same.
        if is_list and str in typing.get_args(hint):
            if isinstance(value, (list, tuple)) and len(value) == 1 and name_and_weight(str(value[0]))[1] is None:
                value = value[0]
            is_list = not isinstance(value, str)
        items = value if is_list else [value]
        if not isinstance(items, (list, tuple)) or not all(
            isinstance(item, _ACCEPTED[kind]) and (kind is bool or not isinstance(item, bool)) for item in items
        ):
            wanted = f"a list of {kind.__name__}" if is_list else f"a{'n' * (kind is int)} {kind.__name__}"
            wanted += f" or {AUTO!r}" * may_be_auto(hint) + ", such as 500K, 1M or 250000" * (name in COUNTS)
            wanted += f", such as {[str(kind) for kind in WIDTH_KINDS]}" * (name == "kinds")
            raise ValueError(f"{name} must be {wanted}; got {value!r}.")
        items = [kind(item) for item in items]
        if kind is float and not all(map(math.isfinite, items)):
            raise ValueError(f"{name} must be a finite number; got {value!r}.")
        setattr(config, name, items if is_list else items[0])


@functools.cache
def _hints(config_class: Any) -> dict[str, Any]:
    # Annotations are evaluated, which takes longer than all checks of their values.
    return typing.get_type_hints(config_class)


def check_one_budget(named: Collection[str]) -> None:
    """Raise `ValueError` where options that were named are a sparsity and a target, which would replace it."""
    targets = [name for name in (*TARGETS, *LIMITS) if name in named]
    if targets and "sparsity" in named:
        raise ValueError(f"sparsity and {targets[0]} are two budgets; set one of them.")


def check_values(config: Options) -> None:
    """Raise `ValueError` where an option is out of range or contradicts another one; the message names the way out."""
    for name in ("sparsity", "attention_sparsity", "mlp_sparsity", "expert_sparsity"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(
                f"{name} must be in [0, 1); got {value}. It is the fraction of the prunable parameters to remove."
                f"{f' Did you mean {value / 100:g}?' * (1 < value < 100)}"
            )
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value not in (None, AUTO) and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    shares_of_phases(config.speed_of)
    if config.ridge is not None and config.ridge < 0:
        raise ValueError(f"ridge must be at least 0; got {config.ridge}.")
    least_squares = config.reconstruction == ReconstructionKind.LEAST_SQUARES
    if config.reconstruction_order == ReconstructionOrder.SEQUENTIAL and not least_squares:
        raise ValueError(
            f"reconstruction_order='sequential' refits weights, and reconstruction is "
            f"{config.reconstruction!r} here; set reconstruction='least_squares', or leave the order 'independent'."
        )
    if config.reconstruction_target is not None and config.reconstruction_order == ReconstructionOrder.INDEPENDENT:
        raise ValueError(
            f"reconstruction_target={config.reconstruction_target!r} is for least squares layer by layer, and "
            f"reconstruction_order is 'independent' here; leave one of them out."
        )
    if config.refit_sources and (
        not least_squares
        or config.reconstruction_order == ReconstructionOrder.INDEPENDENT
        or config.reconstruction_target == ReconstructionTarget.LAYER
    ):
        raise ValueError(
            f"refit_sources needs least squares layer by layer towards the dense model, and reconstruction is "
            f"{config.reconstruction!r}, its order {config.reconstruction_order!r}, its target "
            f"{config.reconstruction_target!r} here; set refit_sources=False, or leave these out."
        )
    if config.cuts_alike and (config.resolved_scope != Scope.LAYER or config.skip_layers):
        raise ValueError(
            f"layout={config.layout!r} cuts every layer alike, and scope={config.scope!r} with "
            f"skip_layers={config.skip_layers} does not; leave out scope and skip_layers."
        )
    if config.resume_seconds < 0:
        raise ValueError(f"resume_seconds must be at least 0; got {config.resume_seconds}.")
    if config.seed < 0:
        raise ValueError(f"seed must be at least 0; got {config.seed}.")
    targets = [name for name in TARGETS if getattr(config, name) is not None]
    for name in targets:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(config, name)}.")
    _check_limits_of_quality(config)
    targets += config.limits_of_quality
    if len(targets) > 1:
        raise ValueError(f"{' and '.join(targets)} are two budgets; set one of them.")
    if config.kinds is not None and not config.kinds:
        raise ValueError("kinds must name at least one of attention, mlp, expert, layer and sublayer; got none.")
    for kind in WIDTH_KINDS:
        if getattr(config, f"{kind}_sparsity") is not None and kind not in config.resolved_kinds:
            raise ValueError(f"{kind}_sparsity is a budget for {kind}, which kinds={config.kinds} excludes.")
    if targets and (config.attention_sparsity is not None or config.mlp_sparsity is not None):
        raise ValueError("A target for the whole model and a sparsity per kind are two budgets; set one of them.")
    for declared in dataclasses.fields(config):
        choices, value = declared.metadata.get("choices"), getattr(config, declared.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if choices is not None and item is not None and item not in choices:
                near = did_you_mean(str(item), choices)
                raise ValueError(f"{declared.name} must be one of {', '.join(choices)}; got {item!r}.{near}")
    check_experts(config)
    check_depth(config)


def _check_limits_of_quality(config: Options) -> None:
    """Raise `ValueError` where a limit of quality is out of range, or cannot be combined with other options."""
    for name, worst in zip(LIMITS, (1.0, 0.0)):
        value = getattr(config, name)
        if value is not None and value <= worst:
            raise ValueError(f"{name} must be more than {worst:g}, the value of the dense model; got {value}.")
    method = METHODS.get(config.method)
    refused = {
        f"rounds={config.rounds}.": config.rounds > 1,
        "scope='search'.": config.scope == Scope.SEARCH,
        f"method={config.method!r}, which learns for a budget.": method is not None and method.learns_split,
    }
    for name in config.limits_of_quality:
        for option, is_set in refused.items():
            if is_set:
                raise ValueError(
                    f"{name} tries several sizes with the same scores, and cannot be combined with {option} Set "
                    f"sparsity instead, or leave that out."
                )
