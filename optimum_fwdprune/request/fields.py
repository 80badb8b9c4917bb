"""How the options of a request are declared: with a default, a help text, the allowed values and a heading."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import field
from typing import Any

from .choices import Choice


class Heading(Choice):
    """The heading that an option has in the help of the command line."""

    METHOD = "method"
    BUDGET = "budget"
    SHARES = "how the budget is shared"
    SEARCH = "search, with --scope search"
    UNITS = "what is pruned"
    RECONSTRUCTION = "reconstruction"
    CALIBRATION = "calibration"
    RUNNING = "interrupt and resume"


# The word that stands for a number which follows from the model.
AUTO = "auto"


def option(default: Any, help: str, choices: Iterable[str] | None = None, group: str | None = None) -> Any:
    """Declare a field of a config.

    Args:
        default: the field's default.
        help (`str`): the field's help text, which the command line and the documentation show.
        choices (iterable of `str`, *optional*): its allowed values, such as a [`Choice`]; by default any.
        group (`str`, *optional*): heading that the help of the command line lists it under; by default the method's.
    """
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = tuple(map(str, choices))
    if group is not None:
        metadata["group"] = group
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=str(default) if isinstance(default, Choice) else default, metadata=metadata)


def field_type(hint: Any) -> tuple[Any, bool, bool]:
    """Return a field's element type, whether the field may be a list, and whether it may be `None`, by its annotation.

    An annotation such as `str | list[str]` allows one element or a list of them. Of `int | str`, which allows
    `"auto"`, the type is `int`.
    """
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    is_optional = types.NoneType in parts
    lists = [part for part in parts if typing.get_origin(part) is list]
    if lists:
        return typing.get_args(lists[0])[0], True, is_optional
    kind = int if may_be_auto(hint) else next(part for part in parts if part is not types.NoneType)
    return kind, False, is_optional


def may_be_auto(hint: Any) -> bool:
    """Return whether a field may be `"auto"` instead of a number, by its annotation, `int | str`."""
    return isinstance(hint, types.UnionType) and set(typing.get_args(hint)) == {int, str}
