"""The command group `optimum-cli fwdprune`."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .compare import BenchmarkCommand, CompareCommand
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .inspect import InspectCommand
from .prune import PruneCommand
from .recover import RecoverCommand
from .report import ReportCommand


class FwdPruneCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="fwdprune", help="Structured pruning of language models with forward passes only.")
    SUBCOMMANDS = (
        CommandInfo(name="prune", help="Prune a model and save it as a checkpoint.", subcommand_class=PruneCommand),
        CommandInfo(
            name="inspect", help="Show what each layer of a pruned checkpoint kept.", subcommand_class=InspectCommand
        ),
        CommandInfo(
            name="report",
            help="Show all that is known of pruned checkpoints, as tables or as a page with pictures.",
            subcommand_class=ReportCommand,
        ),
        CommandInfo(name="export", help="Write another program's format.", subcommand_class=ExportCommand),
        CommandInfo(name="recover", help="Train what pruning left.", subcommand_class=RecoverCommand),
        CommandInfo(
            name="evaluate", help="Measure perplexity, and scores of tasks.", subcommand_class=EvaluateCommand
        ),
        CommandInfo(name="benchmark", help="Time models against each other.", subcommand_class=BenchmarkCommand),
        CommandInfo(
            name="compare",
            help="Show quality, speed and size of models in one table.",
            subcommand_class=CompareCommand,
        ),
    )
