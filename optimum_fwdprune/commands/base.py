"""The base class of all commands: it formats the help, and prints an error as one line."""

from __future__ import annotations

import io
import os
import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout

from optimum.commands.base import BaseOptimumCLICommand

from optimum_fwdprune.runs import ranks

from .wording import in_options


# A shell reports 128 plus this number for a program that writes to a closed pipe.
SIGPIPE = 13


class Command(BaseOptimumCLICommand):
    """A command that prints an error as one line, and its traceback only with `--debug`.

    A subclass sets:

    - `USAGE` (`str`): the required arguments;
    - `DESCRIPTION` (`str`): what the command does;
    - `EXAMPLES` (`tuple[str, ...]`): command lines, without `optimum-cli fwdprune`;
    - `add_options` and `execute`.
    """

    USAGE: str = ""
    DESCRIPTION: str = ""
    EXAMPLES: tuple[str, ...] = ()

    def parse_args(self, parser: ArgumentParser) -> None:
        """Describe the command to `parser`."""
        parser.usage = f"%(prog)s {self.USAGE} [options]"
        parser.description = self.DESCRIPTION
        parser.epilog = "\n".join(["examples:", *(f"  optimum-cli fwdprune {example}" for example in self.EXAMPLES)])
        self.add_options(parser)
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
        try:
            with redirect_stdout(output):
                self._check_names()
                self.execute()
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
