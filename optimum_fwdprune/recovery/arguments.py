"""`RecoveryArguments`: the Trainer's arguments together with those of recovery."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_xla_available

from .options import BLOCK_DISTILL, EPOCHS, LEARNING_RATES, TAUGHT, RecoveryOptions
from .precision import is_fast_in_bfloat16


# Steps between two evaluations where there is held-out data and `eval_strategy` is not set.
EVAL_STEPS = 50


# Arguments besides `mode`, `then` and `adapters` that a command needs to train a model again.
REPRODUCED = (
    "tokens",
    "time",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "layers_per_block",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "teacher_dtype",
    "temperature",
    "distill_weight",
    "hidden_weight",
    "max_length",
    "separate_documents",
    "dataset_config",
    "dataset_split",
    "dataset_column",
    "held_out",
    "early_stopping",
    "bf16",
    "seed",
)


@dataclass
class RecoveryArguments(RecoveryOptions, TrainingArguments):
    """Arguments of `FwdPruner.recover`: those of [`RecoveryOptions`], and all of `transformers.TrainingArguments`.

    These defaults differ from those of `TrainingArguments`: `learning_rate` and `num_train_epochs` depend on what is
    trained (see `LEARNING_RATES` and `EPOCHS`); training warms up over 3 % of the steps, logs every tenth step, and
    multiplies matrices in bfloat16 where CUDA supports it or the CPU has instructions for it (AMX). With `held_out` or
    `early_stopping`, the model is evaluated every 50 steps; and where it is evaluated and saved, the best state is
    loaded at the end.

    Raises:
        ValueError: on a value out of range; the message names the value and the way out.
    """

    learning_rate: float | None = None  # type: ignore[assignment]
    num_train_epochs: float | None = None  # type: ignore[assignment]
    warmup_steps: float = 0.03
    logging_steps: float = 10
    bf16: bool | None = None  # type: ignore[assignment]
    load_best_model_at_end: bool | None = None  # type: ignore[assignment]
    # The data has no unused columns, and the Trainer would remove a teacher's predictions, which the model ignores.
    remove_unused_columns: bool = False

    def __post_init__(self):
        self.check()
        self._asked_epochs = self.num_train_epochs
        self._asked_best = self.load_best_model_at_end
        self._check_one_length()
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.trained]
        if self.num_train_epochs is None:
            self.num_train_epochs = EPOCHS[self.trained]
        self._choose_the_best()
        if self.fp16:
            raise ValueError("fp16 overflows where bfloat16 does not; use bf16=True, or neither.")
        on_cpu = self.use_cpu or not (torch.accelerator.is_available() or is_torch_xla_available())
        if self.bf16 is None:
            self.bf16 = is_fast_in_bfloat16(on_cpu)
        if self.bf16:
            # The Trainer takes the CPU where there is nothing else, but in bfloat16 only if it is asked for.
            self.use_cpu = on_cpu
        if on_cpu:
            # There is no device to copy pinned memory to, of which torch would warn.
            self.dataloader_pin_memory = False
        super().__post_init__()

    def _check_one_length(self) -> None:
        """Raise `ValueError` where the length of the training is set in several ways."""
        budgets = [name for name in ("tokens", "time") if getattr(self, name) is not None]
        others = ["max_steps"] if self.max_steps > 0 else []
        others += ["num_train_epochs"] if self.num_train_epochs is not None else []
        if budgets and others:
            raise ValueError(
                f"{budgets[0]}={getattr(self, budgets[0])!r} cannot be combined with "
                f"{others[0]}={getattr(self, others[0])!r}; leave one of them out."
            )

    def _choose_the_best(self) -> None:
        """Set the arguments for keeping the best state where there is held-out data, unless the user set them."""
        if self.mode == BLOCK_DISTILL:
            self.load_best_model_at_end = bool(self.load_best_model_at_end)
            return
        evaluates = IntervalStrategy(self.eval_strategy) != IntervalStrategy.NO
        if not evaluates and (self.held_out is not None or self.early_stopping is not None):
            evaluates, self.eval_strategy = True, IntervalStrategy.STEPS
            self.eval_steps = self.eval_steps or EVAL_STEPS
        saves = SaveStrategy(self.save_strategy) != SaveStrategy.NO
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = evaluates and saves
            if self.load_best_model_at_end:
                # A checkpoint is written whenever the loss is lower than before.
                self.save_strategy = SaveStrategy.BEST
        if evaluates and self.early_stopping is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"

    def stages(self) -> list[RecoveryArguments]:
        """Return the arguments of every stage of the training: those of the blocks and, if `then` is set, those of the
        whole model, with the default learning rate of its mode."""
        if self.mode != BLOCK_DISTILL or self.then is None:
            return [self]
        blocks = replace(
            self,
            then=None,
            adapters=None,
            teacher_cache=None,
            early_stopping=None,
            eval_strategy="no",
            load_best_model_at_end=False,
            num_train_epochs=self._asked_epochs,
        )
        whole = replace(
            self,
            load_best_model_at_end=self._asked_best,
            mode=self.then,
            then=None,
            teacher=self.teacher if self.then in TAUGHT else None,
            learning_rate=None,
            num_train_epochs=self._asked_epochs,
            resume_from_checkpoint=self._resumed_after_blocks(),
        )
        return [blocks, whole]

    def on_command_line(self) -> list[str]:
        """Return the arguments on which the trained weights depend, as `NAME=VALUE`, where they are no defaults."""
        chosen = {"mode": self.mode, "then": self.then, "adapters": self.adapters}
        defaults = RecoveryArguments(output_dir=str(self.output_dir), **chosen)  # type: ignore[arg-type]
        values = {name: getattr(self, name) for name in REPRODUCED if getattr(self, name) != getattr(defaults, name)}
        # Epochs do not count where the number of steps is set.
        if self._asked_epochs is None:
            values.pop("num_train_epochs", None)
        values = {name: value for name, value in chosen.items() if value not in (None, "lora")} | values
        return [
            f"{name}={','.join(map(str, value)) if isinstance(value, list) else getattr(value, 'value', value)}"
            for name, value in values.items()
            if value is not None
        ]

    def _resumed_after_blocks(self) -> str | None:
        """Return the Trainer's checkpoint to resume the second stage from, if there is one."""
        if str(self.resume_from_checkpoint).lower() != "true":
            return None
        return last_checkpoint(str(self.output_dir))


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the last complete checkpoint of the Trainer in a folder; `None` where there is none.

    The Trainer writes its state last, so that a run that is killed while it writes a checkpoint leaves one without it.
    """
    complete = [
        file.parent
        for file in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        if file.parent.name.rpartition("-")[2].isdecimal() and _is_json(file)
    ]
    return str(max(complete, key=lambda place: int(place.name.rpartition("-")[2]))) if complete else None


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
