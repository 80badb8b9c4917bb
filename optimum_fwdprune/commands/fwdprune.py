"""The command group `optimum-cli fwdprune`."""

from __future__ import annotations

import itertools
import re
from argparse import SUPPRESS, ArgumentParser
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_fwdprune.words import did_you_mean

from .compare import BenchmarkCommand, CompareCommand
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .inspect import InspectCommand
from .parser import HelpFormatter, Parser
from .prune import PruneCommand
from .recover import RecoverCommand
from .report import ReportCommand
from .sweep import SweepCommand


# The commands, in the order of the help, by what they are for. A help text fits into one line of a narrow terminal.
GROUPS = {
    "choose what to prune": (
        CommandInfo("inspect", "Show what a model can lose, or has lost.", InspectCommand),
        CommandInfo("sweep", "Prune to many sizes, and measure each.", SweepCommand),
    ),
    "prune": (CommandInfo("prune", "Prune a model and save it.", PruneCommand),),
    "recover quality": (CommandInfo("recover", "Train a pruned model.", RecoverCommand),),
    "measure": (
        CommandInfo("evaluate", "Measure perplexity and scores of tasks.", EvaluateCommand),
        CommandInfo("benchmark", "Measure speed and size of several models.", BenchmarkCommand),
        CommandInfo("compare", "Measure quality, speed and size together.", CompareCommand),
        CommandInfo("report", "Show how checkpoints were pruned.", ReportCommand),
    ),
    "serve": (CommandInfo("export", "Write a pruned model for other programs.", ExportCommand),),
}


class FwdPruneCommand(BaseOptimumCLICommand):
    """The command group; each of its subcommands has a [`Parser`]."""

    COMMAND = CommandInfo(name="fwdprune", help="Structured pruning of language models with forward passes only.")
    SUBCOMMANDS = tuple(itertools.chain.from_iterable(GROUPS.values()))

    def parse_args(self, parser: ArgumentParser) -> None:
        parser.usage = "%(prog)s COMMAND [options]"
        parser.formatter_class = HelpFormatter
        parser.description = "Structured pruning of language models with forward passes only."
        parser.epilog = "`optimum-cli fwdprune COMMAND --help` shows the options of a command, with examples."
        show = parser.error

        def error(message: str) -> NoReturn:
            """Show the error with the name of the most similar command."""
            wrong = re.search(r"invalid choice: '([^']*)'", message)
            names = [command.name for command in self.SUBCOMMANDS]
            show(message + (did_you_mean(wrong[1], names) if wrong else ""))

        parser.error = error  # type: ignore[method-assign]
        headings = {heading: parser.add_argument_group(heading) for heading in GROUPS}
        self._heading_of = {
            command.name: headings[heading] for heading, commands in GROUPS.items() for command in commands
        }

    @property
    def subparsers(self) -> Any:
        """The subparsers, which are made at the first access."""
        if getattr(self, "_subparsers", None) is None:
            # Each command is listed under its own heading instead.
            self._subparsers = self.parser.add_subparsers(
                help=SUPPRESS, metavar="COMMAND", prog=self.parser.prog, parser_class=Parser
            )
        return self._subparsers

    @subparsers.setter
    def subparsers(self, subparsers: Any) -> None:
        self._subparsers = subparsers

    def register_subcommand(self, command_info: CommandInfo) -> None:
        """Register a command, and list it under its heading in the help."""
        super().register_subcommand(command_info)
        listed = self.subparsers._choices_actions[-1]
        self._heading_of[command_info.name]._group_actions.append(listed)
