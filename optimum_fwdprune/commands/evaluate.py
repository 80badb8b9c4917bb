"""`optimum-cli fwdprune evaluate`: measure the quality of a model."""

from __future__ import annotations

from argparse import ArgumentParser

from .base import Command
from .compare import add_output_option
from .measuring_options import add_evaluation_options, evaluation_options
from .options import add_loading_options, add_tokenizer_option, load_model, load_tokenizer


class EvaluateCommand(Command):
    SHOWS_FIGURES = True
    USAGE = "MODEL"
    DESCRIPTION = "Measure a dense or pruned model's perplexity on texts and its scores on tasks."
    EXAMPLES = ("evaluate pruned --text wikitext2", "evaluate pruned --tasks piqa arc_easy --limit 200")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("model", help="Folder or Hub repository of the model.")
        add_output_option(parser)
        add_evaluation_options(parser)
        add_tokenizer_option(parser)
        add_loading_options(parser)

    def execute(self) -> None:
        if not self.args.text and not self.args.tasks:
            raise ValueError("There is nothing to measure: name --text, --tasks or both.")

        from optimum_fwdprune.evaluation import Comparison, evaluate
        from optimum_fwdprune.evaluation.comparison import checked_format

        if self.args.output:
            checked_format(self.args.output)
        options = evaluation_options(self.args)
        tokenizer = load_tokenizer(self.args.model, self.args)
        evaluation = evaluate(load_model(self.args.model, self.args), tokenizer, name=self.args.model, **options)
        comparison = Comparison([evaluation])
        self.show(comparison, comparison.to_dict())
        if self.args.output:
            comparison.save(self.args.output)
