"""`optimum-cli fwdprune benchmark` and `compare`: measure several models and show them in one table."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Command
from .measuring_options import (
    add_evaluation_options,
    add_speed_options,
    check_different,
    evaluation_options,
    speed_options,
)
from .options import add_loading_options, add_tokenizer_option, load_model, load_tokenizer


if TYPE_CHECKING:
    from optimum_fwdprune.evaluation import Comparison


def add_output_option(parser: ArgumentParser) -> None:
    """Add the option that names the file to write the figures to."""
    parser.add_argument("-o", "--output", help="Also write the figures to this file (.md, .json or .csv).")


class BenchmarkCommand(Command):
    SHOWS_FIGURES = True
    USAGE = "MODEL..."
    DESCRIPTION = (
        "Measure prefill and decoding times, memory, multiplications and size of several models. The models are timed "
        "in turns."
    )
    EXAMPLES = (
        "benchmark dense pruned --batch_sizes 1 8",
        "benchmark dense pruned --prompt_tokens 128 512 -o speed.md",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "models", nargs="+", help="Folders or Hub repositories; speed-ups are relative to the first one."
        )
        add_output_option(parser)
        add_speed_options(parser)
        add_loading_options(parser)

    def execute(self) -> None:
        from optimum_fwdprune.evaluation import Comparison, Evaluation, benchmark
        from optimum_fwdprune.evaluation.comparison import checked_format

        if self.args.output:
            checked_format(self.args.output)
        models = [load_model(name, self.args) for name in self.args.models]
        speeds = benchmark(models, **speed_options(self.args))
        comparison = Comparison([Evaluation(name, {}, [], speed) for name, speed in zip(self.args.models, speeds)])
        self.show(comparison, comparison.to_dict())
        if self.args.output:
            comparison.save(self.args.output)
            print(f"Written to {self.args.output}.")


class CompareCommand(Command):
    SHOWS_FIGURES = True
    USAGE = "DENSE PRUNED..."
    DESCRIPTION = "Compare pruned models with their dense one: size, speed, perplexity and tasks in one table."
    EXAMPLES = (
        "compare dense pruned --text wikitext2 --output table.md",
        "compare dense pruned-20 pruned-40 --text wikitext2 --tasks piqa --limit 200 --output table.json",
        "compare dense pruned --text wikitext2 --cards",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "dense", help="Folder or Hub repository of the dense model; speed-ups are relative to this model."
        )
        parser.add_argument("pruned", nargs="+", help="Folders or Hub repositories of the pruned models.")
        add_output_option(parser)
        parser.add_argument(
            "--cards",
            action="store_true",
            help="Also write the figures to the model cards of the pruned models, which must be folders; what else "
            "is on the cards stays.",
        )
        add_evaluation_options(parser)
        add_speed_options(parser)
        add_tokenizer_option(parser)
        add_loading_options(parser)

    def execute(self) -> None:
        from optimum_fwdprune.checkpoint.measuring import check_cards, save_measurements
        from optimum_fwdprune.evaluation import Comparison
        from optimum_fwdprune.evaluation.comparison import checked_format
        from optimum_fwdprune.loading.base import CARD_NAME

        if self.args.output:
            checked_format(self.args.output)
        if self.args.cards:
            check_cards(self.args.pruned)
        comparison = compare_models([self.args.dense, *self.args.pruned], self.args)
        self.show(comparison, comparison.to_dict())
        if self.args.output:
            comparison.save(self.args.output)
            print(f"Written to {self.args.output}.")
        if self.args.cards:
            for number, folder in enumerate(self.args.pruned, 2):
                # Models that were named before, such as the one that was recovered, are on the card too.
                save_measurements(folder, Comparison(comparison.evaluations[:number]))
                print(f"Written to {Path(folder) / CARD_NAME}.")


def compare_models(names: list[str], args: Namespace) -> Comparison:
    """Measure models and compare them with the first one, by the options of quality, speed and loading."""
    from optimum_fwdprune.evaluation import compare

    check_different(names, "This comparison")
    options = evaluation_options(args)
    tokenizer = load_tokenizer(names[0], args)
    models = {name: load_model(name, args) for name in names}
    return compare(models, tokenizer, **options, **speed_options(args))
