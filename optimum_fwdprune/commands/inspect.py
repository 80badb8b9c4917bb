"""`optimum-cli fwdprune inspect`: what each layer of a checkpoint kept, or what a dense model has to prune."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING

from .base import Command
from .options import naming_the_model


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


class InspectCommand(Command):
    USAGE = "MODEL"
    DESCRIPTION = (
        "Show the units of a model, and of a pruned checkpoint what each layer kept. For a model of a family "
        "that is not supported, show the layout that is recognised and a declaration to register the family with."
    )
    EXAMPLES = (
        "inspect pruned",
        "inspect pruned --history --plot history.svg",
        "inspect org/model --declaration family.py",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("checkpoint", metavar="MODEL", help="Folder or Hub repository, or the file of a plan.")
        parser.add_argument("--history", action="store_true", help="Also show how its masks were learned.")
        parser.add_argument("--plot", help="Draw how its masks were learned into this file (.svg, .png or .pdf).")
        parser.add_argument("--declaration", metavar="FILE", help="Write the declaration of a family into this file.")
        parser.add_argument("--revision", help="Branch, tag or commit of a Hub repository.")
        parser.add_argument("--token", help="Access token of the Hub; by default the one that is logged in.")
        parser.add_argument("--trust_remote_code", action="store_true", help="Run modelling code of the repository.")

    def execute(self) -> None:
        from optimum_fwdprune.allocation.plan import PLAN_NAME

        file = self._file(PLAN_NAME)
        if file is not None:
            self._show_plan(file)
        elif self.args.history or self.args.plot:
            raise self._lacks(PLAN_NAME)
        else:
            self._show_model()

    def _show_plan(self, file: Path) -> None:
        from optimum_fwdprune.allocation.plan import PruningPlan
        from optimum_fwdprune.report import plan_table

        plan = PruningPlan.load(file)
        method, source = plan.metadata.get("method"), plan.metadata.get("source")
        print(f"{plan.model_type} pruned by {method or 'hand'}" + (f", from {source}" if source else ""))
        print(plan_table(plan))
        if not self.args.history and not self.args.plot:
            if str(file) != self.args.checkpoint:
                print()
                self._show_model()
            return

        from optimum_fwdprune.report import history_table, plot_history
        from optimum_fwdprune.scoring.scores import SCORES_NAME, Scores

        scores = self._file(SCORES_NAME)
        if scores is None:
            raise self._lacks(SCORES_NAME)
        history = Scores.load(scores).history
        print(history_table(history))
        if self.args.plot:
            plot_history(history, self.args.plot)
            print(f"Drawn into {self.args.plot}.")

    def _show_model(self) -> None:
        """Show what a model has to prune, or what is left to prune of a pruned one."""
        from optimum_fwdprune.architectures import get_architecture, is_supported
        from optimum_fwdprune.architectures.sizes import ModelSizes
        from optimum_fwdprune.loading.models import build_without_weights
        from optimum_fwdprune.report.layouts import units_table

        options = {"revision": self.args.revision, "token": self.args.token}
        with naming_the_model(self.args.checkpoint):
            model = build_without_weights(
                self.args.checkpoint, trust_remote_code=self.args.trust_remote_code, **options
            )
        print(f"{type(model).__name__} ({model.config.model_type}), {ModelSizes.of(model).parameters:,} parameters")
        if is_supported(model.config):
            # This refuses a language model that cannot be pruned inside its multimodal model.
            get_architecture(model.config).pruned_class(model)
            print(units_table(model))
        else:
            self._declare(model)

    def _declare(self, model: PreTrainedModel) -> None:
        """Show the layout of a family that is not supported, and the declaration to start from."""
        from pathlib import Path

        from optimum_fwdprune.architectures.declaration import declaration_of
        from optimum_fwdprune.architectures.recognition import recognise_layout
        from optimum_fwdprune.report.layouts import linears_table

        layout = recognise_layout(model)
        print(f"Models of type {model.config.model_type!r} are not supported. This layout is recognised:")
        print(linears_table(layout))
        for note in layout.notes:
            print(f"\n{note}")
        if model.config.get_text_config() is not model.config:
            print(
                "\nThe declaration of a multimodal family is written by hand. "
                "docs/contributing/add_an_architecture.md explains it, and models/pruned_llava.py is an example."
            )
            return
        text = declaration_of(model, layout)
        explained = (
            "The family is registered when this file is imported. "
            "docs/contributing/add_an_architecture.md explains it."
        )
        if self.args.declaration is None:
            print(f"\n{explained}\n\n{text}")
        else:
            with Path(self.args.declaration).open("x", encoding="utf-8") as file:
                file.write(text)
            print(f"\n{explained} Written to {self.args.declaration}.")

    def _file(self, name: str) -> Path | None:
        """Return the path of a checkpoint's file, downloaded where it is on the Hub, and `None` where it has none. A
        plan's own path is returned as it is."""
        from pathlib import Path

        path = Path(self.args.checkpoint)
        if not path.exists():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            where = {"revision": self.args.revision, "token": self.args.token}
            try:
                return Path(hf_hub_download(self.args.checkpoint, name, **where))
            except EntryNotFoundError:
                return None
            except (OSError, ValueError) as error:
                message = f"There is no folder {path}, and {name} of a repository {path} cannot be read: {error}"
                raise OSError(message) from error
        if not path.is_dir():
            return path
        return path / name if (path / name).is_file() else None

    def _lacks(self, name: str) -> ValueError:
        return ValueError(
            f"{self.args.checkpoint} has no {name}: the model is dense, was pruned with another tool, or its units "
            f"were not scored."
        )
