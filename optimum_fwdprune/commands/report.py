"""`optimum-cli fwdprune report`: show the records of pruned checkpoints, on the terminal or as a page."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Command
from .compare import compare_models
from .measuring_options import add_evaluation_options, add_speed_options
from .options import add_loading_options, add_tokenizer_option, loading_options


if TYPE_CHECKING:
    from optimum_fwdprune.evaluation import Comparison

# The options of loading that apply to reading a config.
WHERE = ("revision", "token", "trust_remote_code")


class ReportCommand(Command):
    SHOWS_FIGURES = True
    USAGE = "CHECKPOINT..."
    DESCRIPTION = (
        "Show the records of pruned checkpoints: kept units and parameters of every layer, scores, how masks were "
        "learned, and the request. Several checkpoints are compared by quality, speed and size. Nothing is measured "
        "unless --dense, --text or --tasks is set."
    )
    EXAMPLES = (
        "report pruned",
        "report pruned-20 pruned-40 --html report.html --compare table.json",
        "report pruned --html report.html --dense MODEL --text wikitext2",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoints", nargs="+", help="Folders or Hub repositories of pruned checkpoints.")
        output = parser.add_argument_group("output")
        output.add_argument(
            "--html", help="Write a self-contained page with pictures, and a .json file of its figures beside it."
        )
        output.add_argument("-o", "--output", help="Also write the figures to this .json file.")
        output.add_argument("--overwrite", action="store_true", help="Replace files that exist.")
        measured = parser.add_argument_group("quality and speed")
        measured.add_argument(
            "--compare",
            metavar="FILE",
            help="Read quality and speed from this .json file, which `fwdprune compare --output` wrote. Default: the "
            "figures in the checkpoint itself, if any.",
        )
        measured.add_argument(
            "--dense",
            metavar="MODEL",
            help="Measure quality and speed now, and compare with this model (folder or Hub repository).",
        )
        add_tokenizer_option(parser)
        add_evaluation_options(parser)
        add_speed_options(parser)
        add_loading_options(parser)

    def execute(self) -> None:
        from optimum_fwdprune.files import check_output_file, write_text_atomically
        from optimum_fwdprune.report.page import check_page_file

        options = self.args
        measures = options.dense or options.text or options.tasks
        if options.compare and measures:
            raise ValueError(
                "--compare reads earlier measurements, and --dense, --text and --tasks ask for new ones; use one or "
                "the other."
            )
        # The files are checked before anything is measured.
        figures = check_page_file(options.html, options.overwrite)[1] if options.html else None
        if options.output:
            if figures is not None and figures.resolve() == Path(options.output).resolve():
                raise ValueError(
                    f"--html {options.html} writes {options.output} too, with the same figures; leave out --output."
                )
            if check_output_file(options.output, options.overwrite).suffix != ".json":
                raise ValueError(f"--output {options.output} must end in .json.")

        from optimum_fwdprune.report import report_table
        from optimum_fwdprune.report.document import describe_checkpoint, document_of, measured_of
        from optimum_fwdprune.report.page import to_json, write_page

        where = {name: value for name, value in loading_options(options).items() if name in WHERE}
        described = [describe_checkpoint(model_id, name=name, **where) for model_id, name in self._named()]
        if measures or options.compare:
            comparison = self._measured() if measures else self._read()
            # Without a dense model nothing is compared: the first checkpoint is not the origin of the others.
            alone = measures and not options.dense
            for model_id, description in zip(options.checkpoints, described):
                own = comparison.of(model_id)
                description["measured"] = measured_of(own.last() if own and alone else own)
        document = document_of(described)
        self.show(report_table(document), document)
        if options.html:
            figures = write_page(document, options.html, options.overwrite)
            print(f"Written to {options.html}, with its figures in {figures}.")
        if options.output:
            write_text_atomically(check_output_file(options.output, options.overwrite), to_json(document))
            print(f"Figures written to {options.output}.")

    def _named(self) -> list[tuple[str, str]]:
        """Every checkpoint with its label: the last part of its name, or the whole name where labels would repeat."""
        ids = self.args.checkpoints
        short = [Path(model_id).name for model_id in ids]
        return list(zip(ids, short if len(set(short)) == len(ids) else ids))

    def _measured(self) -> Comparison:
        dense = [self.args.dense] if self.args.dense else []
        return compare_models([*dense, *self.args.checkpoints], self.args)

    def _read(self) -> Comparison:
        from optimum_fwdprune.evaluation import Comparison

        comparison = Comparison.load(self.args.compare)
        if not any(comparison.of(model_id) for model_id in self.args.checkpoints):
            names = ", ".join(evaluation.name for evaluation in comparison.evaluations)
            raise ValueError(
                f"{self.args.compare} has figures of {names}, but of none of these checkpoints: "
                f"{', '.join(map(str, self.args.checkpoints))}."
            )
        return comparison
