"""`optimum-cli fwdprune recover`: train a pruned model."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from .base import Command
from .options import (
    add_config_options,
    add_hub_options,
    add_loading_options,
    add_output_folder,
    add_tokenizer_option,
    check_hub_options,
    loading_options,
    naming_the_model,
    push_to_hub,
)
from .training import SOURCES, data_of, named_values, training_arguments, training_folder


# The Trainer's arguments that most runs set, with their help; --set takes all others.
TRAINING = {
    "learning_rate": "Peak learning rate. Default: 1e-3 for adapters and blocks, 1e-4 for all weights at once.",
    "max_steps": "Optimizer steps. Default: as many as num_train_epochs takes.",
    "num_train_epochs": "Passes over the data (default: 1).",
    "per_device_train_batch_size": "Sequences per forward pass (default: 8).",
    "gradient_accumulation_steps": "Forward passes per step (default: 1).",
    "save_steps": "Steps between checkpoints (default: 500).",
    "seed": "Seed of the order of the data and of new adapters (default: 42).",
    "report_to": "Service to log to: tensorboard, wandb, trackio, ... (default: none).",
    "resume_from_checkpoint": "Checkpoint to resume from, or true for the last one in --output_dir.",
}


class RecoverCommand(Command):
    USAGE = "MODEL OUTPUT --dataset TEXT"
    DESCRIPTION = (
        "Train a pruned model, on text alone or also towards the dense model's predictions, and save it. To use "
        "several devices, run: accelerate launch -m optimum.commands.optimum_cli fwdprune recover ..."
    )
    EXAMPLES = (
        "recover pruned recovered --dataset wikitext2",
        "recover pruned recovered --dataset wikitext2 --mode distill --max_steps 200",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        from optimum_fwdprune.recovery.options import HEADINGS, RecoveryOptions

        parser.add_argument("model", help="Folder or Hub repository of the pruned model.")
        add_output_folder(parser, "recovered")
        parser.add_argument(
            "--dataset",
            required=True,
            nargs="+",
            help=f"Training data: {SOURCES}",
        )
        parser.add_argument("--output_dir", help="Folder for the Trainer's checkpoints. Default: OUTPUT-training.")
        headings = {name: heading for heading, names in HEADINGS.items() for name in names}
        add_config_options(parser, RecoveryOptions, set(), lambda field: headings[field.name], {})
        training = parser.add_argument_group("training")
        for name, text in TRAINING.items():
            training.add_argument(f"--{name}", metavar="VALUE", help=text)
        training.add_argument("--gradient_checkpointing", action="store_true", help="Use less memory and more time.")
        training.add_argument(
            "--set",
            nargs="+",
            default=[],
            metavar="NAME=VALUE",
            help="Any other argument of transformers.TrainingArguments, such as weight_decay=0.1 fsdp=full_shard.",
        )
        add_tokenizer_option(parser)
        parser.add_argument(
            "--low-memory",
            "--low_memory",
            action="store_true",
            help="Leave the decoder layers on disk, with --mode block_distill. The trained ones are written to new "
            "files beside OUTPUT.",
        )
        add_loading_options(parser)
        add_hub_options(parser)

    def execute(self) -> None:
        import dataclasses

        from optimum_fwdprune.files import check_output_folder
        from optimum_fwdprune.recovery.options import RecoveryOptions

        arguments = vars(self.args)
        own = {
            field.name: arguments[field.name]
            for field in dataclasses.fields(RecoveryOptions)
            if field.name in arguments
        }
        RecoveryOptions(**own).check()
        check_output_folder(self.args.output, self.args.overwrite)
        check_hub_options(self.args)

        from optimum_fwdprune.pruner import FwdPruner

        arguments = self._arguments(own)
        with naming_the_model(self.args.model):
            options = loading_options(self.args) | {"tokenizer": self.args.tokenizer}
            if self.args.low_memory:
                options |= {"low_memory": True, "offload_folder": Path(self.args.output).absolute().parent}
            pruner = FwdPruner.from_pretrained(self.args.model, **options)
        pruner.check_saving(self.args.output, overwrite=self.args.overwrite)
        pruner.recover(data_of(self.args.dataset, "--dataset"), arguments)
        if arguments.should_save:
            pruner.save_pretrained(self.args.output, overwrite=self.args.overwrite)
            push_to_hub(pruner, self.args)
            print(f"Saved to {self.args.output}.")
            if Path(str(arguments.output_dir)).is_dir():
                size = sum(
                    file.stat().st_size for file in Path(str(arguments.output_dir)).rglob("*") if file.is_file()
                )
                print(
                    f"The training left checkpoints or logs in {arguments.output_dir} ({size / 1e6:,.1f} MB); delete "
                    f"it if you need neither."
                )

    def _arguments(self, own: dict):
        """Return the Trainer's arguments, as its own parser reads them from the options."""
        from optimum_fwdprune.recovery import RecoveryArguments

        values = {name: getattr(self.args, name) for name in TRAINING if getattr(self.args, name) is not None}
        values |= named_values(self.args.set, "--set") | own
        if self.args.gradient_checkpointing:
            # Later releases of transformers warn of the older name.
            known = RecoveryArguments.__dataclass_fields__
            name = next(option for option in ("activation_checkpointing", "gradient_checkpointing") if option in known)
            values[name] = "true"
        folder = training_folder(self.args.output, self.args.output_dir, "--output_dir")
        return training_arguments(values, folder, "--set")
