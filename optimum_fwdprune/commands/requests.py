"""The options of a request, for the commands that prune."""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Collection
from functools import partial
from typing import Any

from .options import add_config_options
from .parser import choice, listed


def add_request_options(parser: ArgumentParser, several: Collection[str] = ()) -> None:
    """Add the options of a request and the presets.

    Args:
        parser (`ArgumentParser`): the parser that gets the options.
        several (collection of `str`, *optional*): options that take several values.
    """
    from optimum_fwdprune.request.budget_options import DEFAULT_DEPTH_METHOD, DEFAULT_EXPERT_METHOD, DEFAULT_METHOD
    from optimum_fwdprune.request.config import DEFAULT_PRESET
    from optimum_fwdprune.request.fields import Heading
    from optimum_fwdprune.scoring.methods import (
        PruningConfig,
        get_method,
        get_preset,
        registered_methods,
        registered_presets,
    )

    presets, methods = registered_presets(), registered_methods()
    parser.add_argument_group("preset", listed({name: get_preset(name).described() for name in presets})).add_argument(
        "--preset",
        **choice(presets),
        help=f"Named set of options, listed above; options on the command line override it (default: "
        f"{DEFAULT_PRESET}).",
    )
    request = parser.add_argument_group(Heading.METHOD, listed({name: get_method(name).summary for name in methods}))
    request.add_argument(
        "--method",
        **choice(methods),
        nargs="+" if "method" in several else None,
        default=SUPPRESS,
        help=f"How units are scored (default: {DEFAULT_METHOD}, {DEFAULT_EXPERT_METHOD} for experts, and "
        f"{DEFAULT_DEPTH_METHOD} for layers and sublayers alone).",
    )
    groups: dict[str, Any] = {Heading.METHOD: request}
    known = {"method"} | add_config_options(
        parser, PruningConfig, {"method"}, lambda field: field.metadata["group"], groups, several
    )
    for name in methods:
        config_class = get_method(name).config_class
        known |= add_config_options(parser, config_class, known, partial(_of_method, name), groups)


def request_options(args: Namespace) -> dict[str, Any]:
    """Return the options of a request that were set, of any method, by name."""
    from optimum_fwdprune.scoring.methods import get_method, registered_methods

    names = {
        field.name for method in registered_methods() for field in dataclasses.fields(get_method(method).config_class)
    }
    return {name: value for name, value in vars(args).items() if name in names}


def check_owned(options: Collection[str], methods: Collection[str]) -> None:
    """Raise `ValueError` where an option belongs to none of the methods, before a model is loaded."""
    from optimum_fwdprune.scoring.methods import get_method, registered_methods

    def fields_of(method: str) -> set[str]:
        return {field.name for field in dataclasses.fields(get_method(method).config_class)}

    known = set[str]().union(*map(fields_of, methods))
    for name in registered_methods():
        for field in dataclasses.fields(get_method(name).config_class):
            if field.name in options and field.name not in known:
                raise ValueError(
                    f"--{field.name} is an option of method {name}; the method asked for is {' or '.join(methods)}."
                )


def _of_method(name: str, _field: Any) -> str:
    return f"method {name}"
