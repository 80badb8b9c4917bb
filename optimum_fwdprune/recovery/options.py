"""What recovery adds to the Trainer's arguments, light enough for a command line to read."""

from __future__ import annotations

from dataclasses import dataclass

from ..request.options import option


LORA, FULL, DISTILL = "lora", "full", "distill"

# Headings of the command line's help. They are not in the fields' metadata, all of which `HfArgumentParser` hands on.
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

# LLM-Pruner's (arXiv 2305.11627) for adapters; all weights bear a smaller one.
LEARNING_RATES = {True: 1e-4, False: 2e-5}


@dataclass
class RecoveryOptions:
    """How a pruned model is trained, and on what; the Trainer's own arguments stand beside these.

    Raises:
        ValueError: on a value out of range, naming the value and the way out.
    """

    mode: str = option(
        LORA,
        "lora: adapters, by cross-entropy; full: all weights; distill: also towards the dense model's predictions.",
        (LORA, FULL, DISTILL),
    )
    adapters: bool | None = option(
        None, "Train LoRA adapters and not all weights. Default: in mode lora and distill, not in full."
    )
    lora_r: int = option(8, "Rank of the adapters.")
    lora_alpha: int = option(16, "Scale of the adapters, by their rank.")
    lora_dropout: float = option(0.05, "Dropout in front of the adapters.")
    lora_targets: list[str] = option(["all-linear"], "Linears that get adapters, by the ends of their names.")
    merge_adapters: bool = option(
        True, "Merge the adapters into the weights, so that the checkpoint is a plain pruned one."
    )
    teacher: str | None = option(
        None, "Model to distill from: a folder or Hub repository. Default: the one that was pruned."
    )
    teacher_dtype: str = option("auto", "Dtype of the teacher; its checkpoint's by default.")
    teacher_device_map: str | None = option(None, "Where the teacher's layers go, such as auto.")
    teacher_cache: str | None = option(
        None,
        "Folder to keep the teacher's likeliest tokens in, so that it is not in memory while training; one that holds "
        "them already is used.",
    )
    teacher_top_k: int = option(64, "How many tokens a place of the text keeps there.")
    temperature: float = option(1.0, "Temperature at which predictions are compared.")
    distill_weight: float = option(
        0.5, "Share of the divergence from the teacher in the loss; the rest is cross-entropy."
    )
    hidden_weight: float = option(
        0.0, "Weight of the squared error of the hidden states, relative to the teacher's mean square, on top."
    )
    max_length: int | None = option(
        None, "Tokens per training sequence. Default: 512, or what the model knows if that is less."
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    dataset_column: str | None = option(
        None, "Column of the text, the chat messages or the token ids. Default: found by its name."
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
                "adapters=False does not go with mode='lora', which trains adapters; for all weights use mode='full' "
                "or mode='distill'."
            )
        if self.mode == FULL and self.adapters:
            raise ValueError(
                "adapters=True does not go with mode='full', which trains all weights; for adapters use mode='lora' "
                "or mode='distill'."
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
            raise ValueError("hidden_weight needs the teacher's hidden states, which teacher_cache does not keep.")
        if self.mode != DISTILL and (self.teacher or self.teacher_cache):
            raise ValueError(f"A teacher is for mode='distill'; the mode asked for is {self.mode!r}.")

    @property
    def trains_adapters(self) -> bool:
        """Whether LoRA adapters are trained and not all weights."""
        return self.mode != FULL if self.adapters is None else self.adapters
