"""`RecoveryArguments`: the Trainer's arguments together with those of recovery."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from .options import LEARNING_RATES, RecoveryOptions


@dataclass
class RecoveryArguments(RecoveryOptions, TrainingArguments):
    """Arguments of `FwdPruner.recover`: those of [`RecoveryOptions`], and all of `transformers.TrainingArguments`.

    These defaults differ from those of `TrainingArguments`: `learning_rate` is 1e-4 for adapters and 2e-5 for all
    weights; training takes one epoch, warms up over 3 % of the steps, logs every tenth step, and uses bfloat16 where
    the accelerator supports it.

    Raises:
        ValueError: on a value out of range; the message names the value and the way out.
    """

    learning_rate: float | None = None  # type: ignore[assignment]
    num_train_epochs: float = 1.0
    warmup_steps: float = 0.03
    logging_steps: float = 10
    bf16: bool | None = None  # type: ignore[assignment]
    # The data has no unused columns, and the Trainer would remove a teacher's predictions, which the model ignores.
    remove_unused_columns: bool = False

    def __post_init__(self):
        self.check()
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.trains_adapters]
        if self.fp16:
            raise ValueError("fp16 overflows where bfloat16 does not; use bf16=True, or neither.")
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
