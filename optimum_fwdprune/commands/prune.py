"""`optimum-cli fwdprune prune`: prune a model and save it."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING

from .base import Command
from .options import (
    add_hub_options,
    add_loading_options,
    add_output_folder,
    add_tokenizer_option,
    check_hub_options,
    loading_options,
    naming_the_model,
    push_to_hub,
)
from .requests import add_request_options, check_owned, request_options
from .training import SOURCES, data_of, named_values, training_arguments, training_folder
from .wording import in_options


if TYPE_CHECKING:
    from optimum_fwdprune.recovery import RecoveryRequest


# Arguments of the training that have several values.
SEVERAL = ("lora_targets",)


class PruneCommand(Command):
    SHOWS_FIGURES = True
    USAGE = "-m MODEL OUTPUT"
    DESCRIPTION = (
        "Prune a model and save it as a checkpoint that from_pretrained loads. By default 20 % of the prunable "
        "parameters are removed. An option changes no other option; a preset is a named set of options."
    )
    EXAMPLES = (
        "prune -m HuggingFaceTB/SmolLM2-135M pruned --sparsity 0.3",
        "prune -m MODEL pruned --sparsity 0.3 --dry-run",
        "prune -m MODEL pruned --preset best --target_parameters 100000000",
        "prune -m MODEL pruned --method flap --scope global --calibration my_text.txt",
        "prune -m MODEL pruned --sparsity 0.4 --rounds 3 --recover wikitext2 --recovery mode=distill tokens=1M",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="Hub repository or folder of the model to prune.")
        add_output_folder(parser, "pruned")
        parser.add_argument(
            "--low-memory",
            "--low_memory",
            action="store_true",
            help="Leave the decoder layers on disk, and read, prune and write them one after the other.",
        )
        parser.add_argument(
            "--dry-run",
            "--dry_run",
            action="store_true",
            help="Show sizes, memory and time of the run, after the same checks, and end before any unit is scored. "
            "Weights are read only where the request measures speed.",
        )
        parser.add_argument(
            "--plan", help="Keep the units of this plan (a JSON file or a pruned checkpoint) instead of scoring them."
        )

        training = parser.add_argument_group("training after every round")
        training.add_argument(
            "--recover",
            nargs="+",
            metavar="SOURCE",
            help=f"Train the model after every round (--rounds) on this data: {SOURCES}",
        )
        training.add_argument(
            "--recovery",
            nargs="+",
            default=[],
            metavar="NAME=VALUE",
            help="Arguments of this training, such as mode=distill tokens=1M learning_rate=1e-4: all options of "
            "`optimum-cli fwdprune recover`, and of transformers.TrainingArguments. Several values are separated by "
            "commas. Amounts are those of one round.",
        )
        add_request_options(parser)
        add_tokenizer_option(parser)
        add_loading_options(parser)
        add_hub_options(parser)

    def execute(self) -> None:
        from optimum_fwdprune.allocation.plan import PruningPlan
        from optimum_fwdprune.files import check_output_folder
        from optimum_fwdprune.request.config import method_of
        from optimum_fwdprune.scoring.methods import PruningConfig, get_preset

        options = request_options(self.args)
        preset = get_preset(self.args.preset).fields if self.args.preset else {}
        method = method_of(self.args.preset, options)
        if method != preset.get("method", method):
            raise ValueError(f"--preset {self.args.preset} is for method {preset['method']}; leave out --method.")
        # The request is checked before a model is loaded.
        check_owned(options, [method])
        config = PruningConfig.of(self.args.preset, replays=self.args.plan is not None, **options)
        output = check_output_folder(self.args.output, self.args.overwrite)
        check_hub_options(self.args)
        recovery = self._recovery()
        plan = PruningPlan.load(self.args.plan) if self.args.plan else None

        from optimum_fwdprune.pruner import FwdPruner

        with naming_the_model(self.args.model):
            loading = loading_options(self.args) | {"tokenizer": self.args.tokenizer}
            if self.args.low_memory:
                # On the disk of the output folder, so that files are renamed and not copied.
                loading |= {"low_memory": True, "offload_folder": output.parent}
            # Latencies are measured with the layers of the model.
            loading |= {"with_weights": not self.args.dry_run or config.target_speedup is not None}
            pruner = FwdPruner.from_pretrained(self.args.model, **loading)
        pruner.check_saving(self.args.output, overwrite=self.args.overwrite)
        if self.args.dry_run:
            outlook = pruner.dry_run(config, plan=plan)
            self.show(in_options(str(outlook), self.parser), outlook.to_dict())
            return
        if recovery is None:
            pruner.prune(config, plan=plan)
        else:
            pruner.prune_and_recover(recovery, config)
        pruner.save_pretrained(self.args.output, overwrite=self.args.overwrite)
        assert pruner.report is not None
        self.show(pruner.report, {"output": str(output), **pruner.report.document()})
        push_to_hub(pruner, self.args)
        print(f"Saved to {self.args.output}. `optimum-cli fwdprune inspect {self.args.output}` shows every layer.")

    def _recovery(self) -> RecoveryRequest | None:
        """Return the training after every round; `None` where the options ask for none."""
        if self.args.recover is None:
            if self.args.recovery:
                raise ValueError(
                    f"--recovery {self.args.recovery[0]} is an argument of the training that --recover asks for; name "
                    f"its data too, such as --recover wikitext2."
                )
            return None
        if self.args.plan is not None:
            raise ValueError(
                "--plan cuts the model at once, and --recover trains it after every round. Leave --recover out, and "
                "run optimum-cli fwdprune recover on the result."
            )
        from optimum_fwdprune.recovery import RecoveryRequest

        values = named_values(self.args.recovery, "--recovery")
        folder = training_folder(self.args.output, values.pop("output_dir", None), "--recovery output_dir")
        divided = {name: value.split(",") if name in SEVERAL else value for name, value in values.items()}
        arguments = training_arguments(divided, folder, "--recovery")
        return RecoveryRequest(data_of(self.args.recover, "--recover"), arguments)
