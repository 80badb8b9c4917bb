"""What the commands share: readable errors, and options made from config fields."""

from __future__ import annotations

import dataclasses
import sys
import typing
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, _ArgumentGroup
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand

from optimum_fwdprune.configuration import field_type


class Command(BaseOptimumCLICommand):
    """A command whose errors are one readable line, and a traceback only with `--debug`."""

    @staticmethod
    def add_common_options(parser: ArgumentParser) -> None:
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    def run(self):
        try:
            self.execute()
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if self.args.debug:
                raise
            message = " ".join(str(error).split()) or "no message"
            # Our own and the Hub's errors speak for themselves; anything else says what it is.
            label = (
                "error" if isinstance(error, (ValueError, OSError, MemoryError)) else f"error: {type(error).__name__}"
            )
            print(f"{label}: {message} (--debug shows the traceback)", file=sys.stderr)
            sys.exit(1)

    def execute(self) -> None:
        """Do the work; raise on failure."""
        raise NotImplementedError


def add_config_options(parser: ArgumentParser | _ArgumentGroup, config_class: type, known: set[str]) -> set[str]:
    """Add an option for every field of a config dataclass that is not `known` yet, and return the names added.

    Options that are not given are absent from the namespace, so that the config's own defaults hold.
    """
    hints = typing.get_type_hints(config_class)
    added = set()
    for field in dataclasses.fields(config_class):
        if field.name in known:
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        text = field.metadata.get("help", "")
        if default not in (None, []):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {shown})"
        kind, is_list, _ = field_type(hints[field.name])
        if kind is bool:
            options: dict[str, Any] = {"action": BooleanOptionalAction}
        else:
            options = {"type": kind, "choices": field.metadata.get("choices"), "nargs": "+" if is_list else None}
            options["metavar"] = None if options["choices"] else kind.__name__.upper()
        parser.add_argument(f"--{field.name}", default=SUPPRESS, help=text.replace("%", "%%"), **options)
        added.add(field.name)
    return added
