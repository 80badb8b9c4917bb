"""`optimum-cli fwdprune export`: a pruned checkpoint for programs that do not know this package."""

from __future__ import annotations

from argparse import ArgumentParser

from .base import Command, add_loading_options, load_model, load_tokenizer


class ExportCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        Command.add_common_options(parser)
        parser.description = (
            "Write a pruned checkpoint in another program's format. stock: unmodified transformers loads it, and all "
            "that load such checkpoints; every layer must have been cut alike (prune --layout stock). Example: "
            "optimum-cli fwdprune export pruned exported --format stock"
        )
        parser.add_argument("model", help="Folder or Hub repository of the pruned model, a causal language model.")
        parser.add_argument("output", help="Folder to write; new or empty.")
        parser.add_argument("--format", choices=("stock",), default="stock", help="What to write (default: stock).")
        parser.add_argument("--overwrite", action="store_true", help="Replace an output that is there.")
        add_loading_options(parser)

    def execute(self) -> None:
        from optimum_fwdprune.utils import check_output_folder

        check_output_folder(self.args.output, self.args.overwrite)

        from optimum_fwdprune.export import export_stock

        model = load_model(self.args.model, self.args)
        tokenizer = load_tokenizer(self.args.model, self.args)
        written = export_stock(model, tokenizer, self.args.output, self.args.overwrite)
        print(f"Written to {written}; its logits are those of {self.args.model}.")
