"""The base class of all commands: it formats the help, and prints an error as one line."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand

from optimum_fwdprune.runs import ranks
from optimum_fwdprune.runs.loggers import WORDING

from .wording import in_options


# A shell reports 128 plus this number for a program that writes to a closed pipe.
SIGPIPE = 13


class Command(BaseOptimumCLICommand):
    """A command that prints an error as one line, and its traceback only with `--debug`.

    A subclass sets:

    - `USAGE` (`str`): the required arguments;
    - `DESCRIPTION` (`str`): what the command does;
    - `EXAMPLES` (`tuple[str, ...]`): command lines, without `optimum-cli fwdprune`;
    - `SHOWS_FIGURES` (`bool`): whether it has `--json`, and calls `show`;
    - `add_options` and `execute`.
    """

    USAGE: str = ""
    DESCRIPTION: str = ""
    EXAMPLES: tuple[str, ...] = ()
    SHOWS_FIGURES: bool = False

    _figures: Mapping[str, Any] | None = None

    def parse_args(self, parser: ArgumentParser) -> None:
        """Describe the command to `parser`."""
        parser.usage = f"%(prog)s {self.USAGE} [options]"
        parser.description = self.DESCRIPTION
        parser.epilog = "\n".join(["examples:", *(f"  optimum-cli fwdprune {example}" for example in self.EXAMPLES)])
        self.add_options(parser)
        if self.SHOWS_FIGURES:
            parser.add_argument(
                "--json",
                action="store_true",
                help="Print one JSON document instead of tables; everything else goes to stderr.",
            )
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        """Add the command's arguments to `parser`."""
        raise NotImplementedError

    def run(self):
        # Of several processes only one prints.
        output = sys.stdout if ranks.speaks() else io.StringIO()
        if isinstance(output, io.TextIOWrapper):
            # Tables contain characters that not every terminal can show.
            output.reconfigure(errors="replace")
        is_json = self.SHOWS_FIGURES and self.args.json
        wording = WORDING.set(lambda message: in_options(message, self.parser))
        try:
            with redirect_stdout(sys.stderr if is_json and ranks.speaks() else output):
                self._check_names()
                self.execute()
            if is_json:
                print(json.dumps(_json_values(self._figures), indent=1, allow_nan=False), file=output)
            if output is not None:
                output.flush()
        except KeyboardInterrupt:
            print(f"Interrupted.{self._how_to_resume()}", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            # The program that read the output, such as head, has ended. The buffered rest is discarded.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(128 + SIGPIPE)
        except Exception as error:
            if self.args.debug:
                raise
            message = " ".join(str(error).split()) or "no message"
            if isinstance(error, OSError) and error.filename and error.strerror:
                message = f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}."
            # The messages of these errors are complete sentences; of any other error the type is shown too.
            label = (
                "error" if isinstance(error, (ValueError, OSError, MemoryError)) else f"error: {type(error).__name__}"
            )
            print(f"{label}: {in_options(message, self.parser)} (--debug shows the traceback)", file=sys.stderr)
            sys.exit(1)
        finally:
            WORDING.reset(wording)

    def show(self, table: Any, figures: Mapping[str, Any]) -> None:
        """Print a table, or with `--json`, once the command is done, its figures.

        Args:
            table: what is printed.
            figures (mapping): the same as JSON values, with the keys that docs/reference/json.md lists.
        """
        if self.args.json:
            self._figures = figures
        else:
            print(table)

    def _check_names(self) -> None:
        """Raise `ValueError` where an argument is empty, which an unset variable of the shell causes."""
        for action in self.parser._actions:
            values = getattr(self.args, action.dest, None)
            if "" in (values if isinstance(values, list) else [values]):
                name = action.option_strings[-1] if action.option_strings else action.dest.upper()
                raise ValueError(f"{name} is empty; give it a value.")

    def _how_to_resume(self) -> str:
        folder = getattr(self.args, "resume", None)
        return f" Run the same command again to resume from the state in {folder}." if folder else ""

    def execute(self) -> None:
        """Carry out the command; raise an exception on failure."""
        raise NotImplementedError


def _json_values(values: Any) -> Any:
    """Return JSON values with NaN and infinity, which JSON lacks, as text."""
    if isinstance(values, Mapping):
        return {str(name): _json_values(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_json_values(value) for value in values]
    return str(values) if isinstance(values, float) and not math.isfinite(values) else values
