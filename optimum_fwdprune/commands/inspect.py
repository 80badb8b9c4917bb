"""`optimum-cli fwdprune inspect`: what each layer of a checkpoint kept, or what a dense model has to prune."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

from .base import Command
from .options import naming_the_model


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


class InspectCommand(Command):
    SHOWS_FIGURES = True
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
        parts: list[str] = []
        figures: dict[str, Any] = dict.fromkeys(("plan", "history", "model", "layout"))
        if file is not None:
            self._add_plan(file, parts, figures)
        elif self.args.history or self.args.plot:
            raise self._lacks(PLAN_NAME)
        if not (self.args.history or self.args.plot or (file is not None and str(file) == self.args.checkpoint)):
            self._add_model(parts, figures)
        self.show("\n".join(parts), figures)

    def _add_plan(self, file: Path, parts: list[str], figures: dict[str, Any]) -> None:
        """Add what each layer kept by a plan, and how its masks were learned where the options ask for it."""
        from optimum_fwdprune.allocation.plan import PruningPlan
        from optimum_fwdprune.report import plan_table
        from optimum_fwdprune.report.tables import plan_figures

        plan = PruningPlan.load(file)
        figures["plan"] = plan_figures(plan)
        method, source = plan.metadata.get("method"), plan.metadata.get("source")
        parts.append(f"{plan.model_type} pruned by {method or 'hand'}" + (f", from {source}" if source else ""))
        parts.append(plan_table(plan))
        if not self.args.history and not self.args.plot:
            if str(file) != self.args.checkpoint:
                parts.append("")
            return

        from optimum_fwdprune.report import history_table, plot_history
        from optimum_fwdprune.report.learning import learning_of
        from optimum_fwdprune.scoring.scores import SCORES_NAME, Scores

        scores = self._file(SCORES_NAME)
        if scores is None:
            raise self._lacks(SCORES_NAME)
        history = Scores.load(scores).history
        parts.append(history_table(history))
        figures["history"] = learning_of(history)
        if self.args.plot:
            plot_history(history, self.args.plot)
            parts.append(f"Drawn into {self.args.plot}.")

    def _add_model(self, parts: list[str], figures: dict[str, Any]) -> None:
        """Add what a model has to prune, or what is left to prune of a pruned one."""
        from optimum_fwdprune.architectures import get_architecture, is_supported
        from optimum_fwdprune.architectures.sizes import ModelSizes
        from optimum_fwdprune.loading.models import build_without_weights
        from optimum_fwdprune.report.layouts import units_of, units_table

        options = {"revision": self.args.revision, "token": self.args.token}
        with naming_the_model(self.args.checkpoint):
            model = build_without_weights(
                self.args.checkpoint, trust_remote_code=self.args.trust_remote_code, **options
            )
        name, model_type, parameters = type(model).__name__, model.config.model_type, ModelSizes.of(model).parameters
        parts.append(f"{name} ({model_type}), {parameters:,} parameters")
        figures["model"] = {"class": name, "model_type": model_type, "parameters": parameters}
        if is_supported(model.config):
            # This refuses a language model that cannot be pruned inside its multimodal model.
            get_architecture(model.config).pruned_class(model)
            parts.append(units_table(model))
            figures["model"] |= units_of(model)
        else:
            self._add_layout(model, parts, figures)

    def _add_layout(self, model: PreTrainedModel, parts: list[str], figures: dict[str, Any]) -> None:
        """Add the layout of a family that is not supported, and the declaration to start from."""
        from pathlib import Path

        from optimum_fwdprune.architectures.declaration import declaration_of
        from optimum_fwdprune.architectures.recognition import recognise_layout
        from optimum_fwdprune.report.layouts import linears_table

        layout = recognise_layout(model)
        linears = {name: {"features": str(shape), "role": layout.role(name)} for name, shape in layout.linears.items()}
        figures["layout"] = {"linears": linears, "notes": list(layout.notes), "declaration": None}
        parts.append(f"Models of type {model.config.model_type!r} are not supported. This layout is recognised:")
        parts.append(linears_table(layout))
        parts += [f"\n{note}" for note in layout.notes]
        if model.config.get_text_config() is not model.config:
            parts.append(
                "\nThe declaration of a multimodal family is written by hand. "
                "docs/contributing/add_an_architecture.md explains it, and models/pruned_llava.py is an example."
            )
            return
        text = declaration_of(model, layout)
        figures["layout"]["declaration"] = text
        explained = (
            "The family is registered when this file is imported. "
            "docs/contributing/add_an_architecture.md explains it."
        )
        if self.args.declaration is None:
            parts.append(f"\n{explained}\n\n{text}")
        else:
            with Path(self.args.declaration).open("x", encoding="utf-8") as file:
                file.write(text)
            parts.append(f"\n{explained} Written to {self.args.declaration}.")

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
