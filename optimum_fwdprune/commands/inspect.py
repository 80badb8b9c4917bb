"""`optimum-cli fwdprune inspect`: what each layer of a checkpoint kept."""

from __future__ import annotations

from argparse import ArgumentParser

from .base import Command


class InspectCommand(Command):
    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        Command.add_common_options(parser)
        parser.description = "Show what each layer of a pruned checkpoint kept."
        parser.add_argument("checkpoint", help="Folder or Hub repository of a pruned checkpoint.")
        parser.add_argument("--revision", help="Branch, tag or commit of a Hub repository.")

    def execute(self) -> None:
        from pathlib import Path

        from optimum_fwdprune.plan import PLAN_NAME, PruningPlan
        from optimum_fwdprune.report import plan_table

        path = Path(self.args.checkpoint)
        if not path.exists():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(self.args.checkpoint, PLAN_NAME, revision=self.args.revision))
        elif path.is_dir() and not (path / PLAN_NAME).is_file():
            raise ValueError(f"{path} has no {PLAN_NAME}, so it is no checkpoint that this package pruned.")
        plan = PruningPlan.load(path)
        method, source = plan.metadata.get("method"), plan.metadata.get("source")
        print(f"{plan.model_type} pruned by {method or 'hand'}" + (f", from {source}" if source else ""))
        print(plan_table(plan))
