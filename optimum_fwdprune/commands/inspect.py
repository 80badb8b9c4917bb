"""`optimum-cli fwdprune inspect`: show what each layer of a checkpoint kept."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING

from .base import Command


if TYPE_CHECKING:
    from pathlib import Path


class InspectCommand(Command):
    USAGE = "CHECKPOINT"
    DESCRIPTION = "Show what each layer of a pruned checkpoint kept."
    EXAMPLES = ("inspect pruned", "inspect pruned --history --plot history.svg")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoint", help="Folder or Hub repository of a pruned checkpoint.")
        parser.add_argument("--history", action="store_true", help="Also show a table of how its masks were learned.")
        parser.add_argument("--plot", help="Write a plot of how its masks were learned (.svg, .png or .pdf file).")
        parser.add_argument("--revision", help="Branch, tag or commit of a Hub repository.")

    def execute(self) -> None:
        from optimum_fwdprune.allocation.plan import PLAN_NAME, PruningPlan
        from optimum_fwdprune.report import plan_table

        plan = PruningPlan.load(self._file(PLAN_NAME))
        method, source = plan.metadata.get("method"), plan.metadata.get("source")
        print(f"{plan.model_type} pruned by {method or 'hand'}" + (f", from {source}" if source else ""))
        print(plan_table(plan))
        if not self.args.history and not self.args.plot:
            return

        from optimum_fwdprune.report import history_table, plot_history
        from optimum_fwdprune.scoring.scores import SCORES_NAME, Scores

        history = Scores.load(self._file(SCORES_NAME)).history
        print(history_table(history))
        if self.args.plot:
            plot_history(history, self.args.plot)
            print(f"The plot was written to {self.args.plot}.")

    def _file(self, name: str) -> Path:
        """Return the path of a checkpoint's file, downloaded where it is on the Hub; a plan's own path as it is."""
        from pathlib import Path

        path = Path(self.args.checkpoint)
        if not path.exists():
            from huggingface_hub import hf_hub_download

            try:
                return Path(hf_hub_download(self.args.checkpoint, name, revision=self.args.revision))
            except (OSError, ValueError) as error:
                message = f"There is no folder {path}, and {name} of a repository {path} cannot be read: {error}"
                raise OSError(message) from error
        if not path.is_dir():
            return path
        if not (path / name).is_file():
            raise ValueError(
                f"{path} has no {name}: the model is dense, was pruned with another tool, or its units were not "
                f"scored."
            )
        return path / name
