"""`optimum-cli fwdprune evaluate`: how good a model is."""

from __future__ import annotations

from argparse import ArgumentParser

from .base import (
    Command,
    add_evaluation_options,
    add_loading_options,
    evaluation_options,
    load_model,
    load_tokenizer,
)
from .compare import add_output_option


class EvaluateCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        Command.add_common_options(parser)
        parser.description = (
            "Measure the perplexity of texts and the scores of tasks, of a dense or a pruned model. Example: "
            "optimum-cli fwdprune evaluate pruned --text wikitext2 --tasks piqa arc_easy"
        )
        parser.add_argument("model", help="Folder or Hub repository of the model.")
        add_output_option(parser)
        add_evaluation_options(parser)
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
        found = evaluate(load_model(self.args.model, self.args), tokenizer, name=self.args.model, **options)
        comparison = Comparison([found])
        print(comparison)
        if self.args.output:
            comparison.save(self.args.output)
