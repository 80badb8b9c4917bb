"""The options of recovery that the Trainer's arguments lack. Importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..request.fields import option


LORA, FULL, DISTILL = "lora", "full", "distill"

# Headings of the command line's help. They are not in the fields' metadata, which `HfArgumentParser` passes on.
HEADINGS = {
    "recovery": ("mode", "adapters"),
    "adapters": ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "merge_adapters"),
    "distillation, with --mode distill": (
        "teacher",
        "teacher_dtype",
        "teacher_device_map",
        "teacher_cache",
        "teacher_top_k",
        "temperature",
        "distill_weight",
        "hidden_weight",
    ),
    "data": ("max_length", "dataset_config", "dataset_split", "dataset_column"),
}

# By whether adapters are trained. The rate of adapters is LLM-Pruner's (arXiv 2305.11627); all weights need a smaller
# one.
LEARNING_RATES = {True: 1e-4, False: 2e-5}


@dataclass
class RecoveryOptions:
    """The options of recovery, which [`RecoveryArguments`] combines with the Trainer's own arguments.

    Raises:
        ValueError: on a value out of range; the message names the value and the way out.
    """

    mode: str = option(
        LORA,
        "lora: train adapters on the text. full: train all weights on the text. distill: train on the text and "
        "towards the dense model's predictions.",
        (LORA, FULL, DISTILL),
    )
    adapters: bool | None = option(
        None, "Train LoRA adapters and not all weights. Default: true in modes lora and distill, false in mode full."
    )
    lora_r: int = option(8, "Rank of the adapters.")
    lora_alpha: int = option(16, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout of the adapters' inputs.")
    lora_targets: list[str] = option(
        ["all-linear"], "Linears that get adapters: the ends of their names, such as q_proj, or all-linear."
    )
    merge_adapters: bool = option(
        True, "Merge the adapters into the weights, so that the checkpoint loads without PEFT."
    )
    teacher: str | None = option(
        None, "Folder or Hub repository of the model to distill from. Default: the model that was pruned."
    )
    teacher_dtype: str = option("auto", "Dtype of the teacher. auto: that of its checkpoint.")
    teacher_device_map: str | None = option(
        None, "Device of the teacher's layers, such as auto. Default: that of the student."
    )
    teacher_cache: str | None = option(
        None,
        "Folder to store the teacher's likeliest tokens in before training, so that the teacher is not in memory "
        "during training. If the folder holds them already, they are read from it.",
    )
    teacher_top_k: int = option(64, "Number of likeliest tokens per position that teacher_cache stores.")
    temperature: float = option(1.0, "Temperature at which the two models' predictions are compared.")
    distill_weight: float = option(
        0.5, "Weight of the divergence from the teacher in the loss, from 0 to 1; the rest is cross-entropy."
    )
    hidden_weight: float = option(
        0.0,
        "Weight of the error of the hidden states, which is added to the loss: the squared error relative to the mean "
        "square of the teacher's.",
    )
    max_length: int | None = option(
        None, "Tokens per training sequence. Default: 512, or the model's number of positions if that is smaller."
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    dataset_column: str | None = option(
        None, "Column of the text, the chat messages or the token ids. Default: detected by its name."
    )

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        modes = (LORA, FULL, DISTILL)
        if self.mode not in modes:
            raise ValueError(f"mode must be one of {', '.join(modes)}; got {self.mode!r}.")
        if isinstance(self.lora_targets, str):
            self.lora_targets = [self.lora_targets]
        if self.mode == LORA and self.adapters is False:
            raise ValueError(
                "adapters=False cannot be combined with mode='lora', which trains adapters; for all weights use "
                "mode='full' or mode='distill'."
            )
        if self.mode == FULL and self.adapters:
            raise ValueError(
                "adapters=True cannot be combined with mode='full', which trains all weights; for adapters use "
                "mode='lora' or mode='distill'."
            )
        for name in ("lora_r", "lora_alpha", "teacher_top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2; got {self.max_length}.")
        for name in ("lora_dropout", "distill_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {getattr(self, name)}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}.")
        if self.hidden_weight < 0:
            raise ValueError(f"hidden_weight must be at least 0; got {self.hidden_weight}.")
        if self.hidden_weight and self.teacher_cache:
            raise ValueError("hidden_weight needs the teacher's hidden states, which teacher_cache does not store.")
        if self.mode != DISTILL and (self.teacher or self.teacher_cache):
            raise ValueError(f"A teacher is used with mode='distill' only; the mode is {self.mode!r} here.")

    @property
    def trains_adapters(self) -> bool:
        """Whether LoRA adapters are trained and not all weights."""
        return self.mode != FULL if self.adapters is None else self.adapters
