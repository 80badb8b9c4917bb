"""The command group `optimum-cli fwdprune`."""

from __future__ import annotations

import re
from argparse import ArgumentParser
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


class FwdPruneCommand(BaseOptimumCLICommand):
    """The command group; each of its subcommands has a [`Parser`]."""

    COMMAND = CommandInfo(name="fwdprune", help="Structured pruning of language models with forward passes only.")
    SUBCOMMANDS = (
        CommandInfo(name="prune", help="Prune a model and save it as a checkpoint.", subcommand_class=PruneCommand),
        CommandInfo(name="sweep", help="Prune a model to many sizes and measure them.", subcommand_class=SweepCommand),
        CommandInfo(
            name="inspect",
            help="Show what each layer of a checkpoint kept, or what a dense model has to prune.",
            subcommand_class=InspectCommand,
        ),
        CommandInfo(
            name="report",
            help="Show the records of pruned checkpoints, as tables or as a page with pictures.",
            subcommand_class=ReportCommand,
        ),
        CommandInfo(
            name="export", help="Write a pruned model in another program's format.", subcommand_class=ExportCommand
        ),
        CommandInfo(name="recover", help="Train a pruned model.", subcommand_class=RecoverCommand),
        CommandInfo(
            name="evaluate", help="Measure perplexity and the scores of tasks.", subcommand_class=EvaluateCommand
        ),
        CommandInfo(name="benchmark", help="Measure the speed and size of models.", subcommand_class=BenchmarkCommand),
        CommandInfo(
            name="compare",
            help="Show quality, speed and size of models in one table.",
            subcommand_class=CompareCommand,
        ),
    )

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

    @property
    def subparsers(self) -> Any:
        """The subparsers, which are made at the first access."""
        if getattr(self, "_subparsers", None) is None:
            self._subparsers = self.parser.add_subparsers(
                title="commands", metavar="COMMAND", prog=self.parser.prog, parser_class=Parser
            )
        return self._subparsers

    @subparsers.setter
    def subparsers(self, subparsers: Any) -> None:
        self._subparsers = subparsers
