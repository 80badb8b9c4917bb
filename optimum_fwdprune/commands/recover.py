"""`optimum-cli fwdprune recover`: train a pruned model."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from pathlib import Path
from typing import Any

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
            help="Training data: a .txt, .json, .jsonl or .parquet file, wikitext2, c4, builtin (Python's "
            "documentation), self (text that the teacher writes), or a dataset of the Hub. Its rows are text, chat "
            "messages, or questions with answers. Several are mixed by their weights: wikitext2 chats.jsonl:0.5.",
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

        from optimum_fwdprune.data.mixtures import Mixture
        from optimum_fwdprune.pruner import FwdPruner

        arguments = self._arguments(own)
        with naming_the_model(self.args.model):
            options = loading_options(self.args) | {"tokenizer": self.args.tokenizer}
            if self.args.low_memory:
                options |= {"low_memory": True, "offload_folder": Path(self.args.output).absolute().parent}
            pruner = FwdPruner.from_pretrained(self.args.model, **options)
        pruner.check_saving(self.args.output, overwrite=self.args.overwrite)
        sources = self.args.dataset
        pruner.recover(sources[0] if len(sources) == 1 else Mixture.of_names(sources), arguments)
        if arguments.should_save:
            pruner.save_pretrained(self.args.output, overwrite=self.args.overwrite)
            push_to_hub(pruner, self.args)
            print(f"Saved to {self.args.output}.")
            if Path(str(arguments.output_dir)).is_dir():
                print(
                    f"The training left checkpoints or logs in {arguments.output_dir}; delete it if you need neither."
                )

    def _training_folder(self) -> str:
        """Return the folder of the Trainer's checkpoints, outside of OUTPUT, which stays empty until the end."""
        output = Path(self.args.output).resolve()
        folder = Path(self.args.output_dir or f"{str(self.args.output).rstrip('/')}-training")
        if output in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(
                f"--output_dir {folder} lies in {self.args.output}, which must be empty until the trained model is "
                f"saved to it; name a folder outside of it."
            )
        return str(folder)

    def _arguments(self, own: dict):
        """Return the Trainer's arguments, as its own parser reads them from the options."""
        from transformers import HfArgumentParser, IntervalStrategy

        from optimum_fwdprune.recovery import RecoveryArguments
        from optimum_fwdprune.words import did_you_mean

        texts = {name: getattr(self.args, name) for name in TRAINING if getattr(self.args, name) is not None}
        for pair in self.args.set:
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"--set takes NAME=VALUE; got {pair!r}.")
            texts[name] = value
        known = set(RecoveryArguments.__dataclass_fields__)
        for name in texts:
            if name not in known:
                raise ValueError(
                    f"--set takes arguments of transformers.TrainingArguments, which has no {name!r}."
                    f"{did_you_mean(name, known)}"
                )
        words = [word for name, value in texts.items() for word in (f"--{name}", value)]
        for name, value in own.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        if self.args.gradient_checkpointing:
            # Later releases of transformers warn of the older name.
            name = next(option for option in ("activation_checkpointing", "gradient_checkpointing") if option in known)
            words += [f"--{name}", "true"]
        parser: Any = HfArgumentParser(RecoveryArguments, exit_on_error=False)  # type: ignore[arg-type]
        try:
            (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", self._training_folder(), *words])
        except ArgumentError as error:
            # The message alone: argparse would add the usage of every training argument.
            raise ValueError(str(error)) from error
        strategy = IntervalStrategy(parsed.eval_strategy)
        if strategy != IntervalStrategy.NO and parsed.held_out is None:
            raise ValueError(
                f"--set eval_strategy={strategy.value} needs data to evaluate on: set --held_out to a share of the "
                f"data, such as 0.05, or pass eval_dataset to FwdPruner.recover in Python."
            )
        return parsed
