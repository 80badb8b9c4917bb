"""`optimum-cli fwdprune sweep`: prune a model to many sizes and measure them."""

from __future__ import annotations

from argparse import ArgumentParser

from .base import Command
from .measuring_options import add_speed_options, add_text_options, read_texts, speed_options
from .options import add_loading_options, add_tokenizer_option, loading_options, naming_the_model
from .requests import add_request_options, check_owned, request_options


class SweepCommand(Command):
    SHOWS_FIGURES = True
    USAGE = "-m MODEL FOLDER --sparsity N..."
    DESCRIPTION = (
        "Prune a model to many sizes, and measure perplexity, divergence from the dense model, size and speed of "
        "each. Units are scored once, and the dense model runs once. The folder gets sweep.json, a picture, the "
        "plans, and the checkpoints to keep. If it holds a sweep of this model, that is continued."
    )
    EXAMPLES = (
        "sweep -m MODEL sizes --sparsity 0.1 0.2 0.3 0.4 0.5 --text my_test_text.txt",
        "sweep -m MODEL sizes --sparsity 0.2 0.3 --method wanda_sp flap --keep 0.3 --no-speed",
        "sweep -m MODEL sizes --target_bytes 200000000 150000000 --preset fast",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        from optimum_fwdprune.request.axes import BUDGETS, OTHERS

        parser.add_argument("-m", "--model", required=True, help="Hub repository or folder of the model to prune.")
        parser.add_argument("folder", help="Folder of the results, new or that of a sweep to continue.")
        parser.add_argument(
            "--keep",
            type=float,
            metavar="N",
            nargs="+",
            default=[],
            help="Sizes whose models are saved as checkpoints, in subfolders.",
        )
        measured = parser.add_argument_group("what is measured")
        add_text_options(measured)
        measured.add_argument("--no-speed", "--no_speed", action="store_true", help="Do not time the models.")
        add_speed_options(parser)
        add_request_options(parser, several=(*BUDGETS, *OTHERS))
        add_tokenizer_option(parser)
        add_loading_options(parser)

    def execute(self) -> None:
        from optimum_fwdprune.sweep.grid import Grid, methods_of

        fields = request_options(self.args)
        # The requests are checked before a model is loaded.
        check_owned(fields, methods_of(self.args.preset, fields))
        Grid.of(self.args.preset, fields).check_sizes(self.args.keep)
        texts = read_texts(self.args)

        from optimum_fwdprune.pruner import FwdPruner
        from optimum_fwdprune.sweep import Measures

        measures = Measures(texts, self.args.max_length, not self.args.no_speed, **speed_options(self.args))
        with naming_the_model(self.args.model):
            loading = loading_options(self.args) | {"tokenizer": self.args.tokenizer}
            pruner = FwdPruner.from_pretrained(self.args.model, **loading)
        result = pruner.sweep(self.args.folder, self.args.preset, measures=measures, keep=self.args.keep, **fields)
        self.show(result, result.to_dict())
        print(f"The figures are in {self.args.folder}/sweep.json.")
