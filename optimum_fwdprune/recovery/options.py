"""The options of recovery that the Trainer's arguments lack. Importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..request.fields import option
from .budgets import seconds_of, tokens_of


LORA, FULL, DISTILL, BLOCK_DISTILL = "lora", "full", "distill", "block_distill"

# Modes that train the whole model at once, with the Trainer.
WHOLE = (LORA, FULL, DISTILL)

# Modes that need a teacher.
TAUGHT = (DISTILL, BLOCK_DISTILL)

# Headings of the command line's help. They are not in the fields' metadata, which `HfArgumentParser` passes on.
HEADINGS = {
    "recovery": ("mode", "then", "adapters", "tokens", "time"),
    "adapters": ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "merge_adapters"),
    "distillation by blocks, with --mode block_distill": ("layers_per_block", "hidden_states_gb"),
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
    "data": ("max_length", "separate_documents", "dataset_config", "dataset_split", "dataset_column"),
    "choosing the best": ("held_out", "early_stopping"),
}

# What is trained: adapters, all weights at once, or those of one block after the other.
ADAPTERS, WEIGHTS, BLOCKS = "adapters", "weights", "blocks"

# Chosen by short runs on SmolLM2-135M (docs/benchmarks/recovery.md). All weights need a smaller rate than others.
LEARNING_RATES = {ADAPTERS: 1e-3, WEIGHTS: 1e-4, BLOCKS: 1e-3}

# Passes over the data.
EPOCHS = {ADAPTERS: 1.0, WEIGHTS: 1.0, BLOCKS: 1.0}


@dataclass
class RecoveryOptions:
    """The options of recovery, which [`RecoveryArguments`] combines with the Trainer's own arguments.

    Raises:
        ValueError: on a value out of range; the message names the value and the way out.
    """

    mode: str = option(
        LORA,
        "lora: train adapters on the text. full: train all weights on the text. distill: train on the text and "
        "towards the dense model's predictions. block_distill: train one decoder layer after the other towards the "
        "dense model's hidden states after it, in the memory of one layer.",
        (*WHOLE, BLOCK_DISTILL),
    )
    then: str | None = option(
        None, "Mode in which the whole model is trained after block_distill. Default: it is not.", WHOLE
    )
    adapters: bool | None = option(
        None, "Train LoRA adapters and not all weights. Default: true in modes lora and distill, false in others."
    )
    tokens: str | None = option(
        None,
        "Number of tokens to train on, such as 500K or 1M, in the place of max_steps and num_train_epochs. Data with "
        "fewer tokens is repeated up to four times.",
    )
    time: str | None = option(
        None,
        "Time to train for, such as 30m or 2h, in the place of max_steps and num_train_epochs. The training ends "
        "earlier after four passes over the data.",
    )
    layers_per_block: int = option(1, "Decoder layers that are trained together.")
    hidden_states_gb: float | None = option(
        None,
        "Memory for hidden states of the training data, in GiB; larger ones are in files of output_dir. Default: half "
        "of the available memory.",
    )
    lora_r: int = option(8, "Rank of the adapters.")
    lora_alpha: int = option(16, "Scale of the adapters: their output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout of the adapters' inputs; mixtures of experts have none.")
    lora_targets: list[str] = option(
        ["all-linear"],
        "Linears and weights of experts that get adapters: the ends of their names, such as q_proj, or all-linear.",
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
    separate_documents: bool = option(
        False, "Let no token of packed text attend to those of other texts. Default: texts are joined by EOS."
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    dataset_column: str | None = option(
        None, "Column of the text, the chat messages or the token ids. Default: detected by its name."
    )

    held_out: float | None = option(
        None,
        "Share of the training data, such as 0.05, that is held out to choose the best state by. Default: none, and "
        "one sixteenth in mode block_distill.",
    )
    early_stopping: int | None = option(
        None, "End the training after this number of evaluations on held-out data without a lower loss."
    )

    def check(self) -> None:
        """Raise `ValueError` on a value out of range."""
        modes = (*WHOLE, BLOCK_DISTILL)
        if self.mode not in modes:
            raise ValueError(f"mode must be one of {', '.join(modes)}; got {self.mode!r}.")
        self._check_blocks()
        self._check_budget()
        self._check_held_out()
        self._check_documents()
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
        for name in ("lora_r", "lora_alpha", "teacher_top_k", "layers_per_block"):
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
        if self.mode not in TAUGHT and (self.teacher or self.teacher_cache):
            raise ValueError(
                f"A teacher is used with mode='distill' or 'block_distill' only; the mode is {self.mode!r} here."
            )

    def _check_budget(self) -> None:
        if self.tokens is not None:
            tokens_of(self.tokens)
        if self.time is not None:
            seconds_of(self.time)
        if self.tokens is not None and self.time is not None:
            raise ValueError(
                f"tokens={self.tokens!r} cannot be combined with time={self.time!r}; leave one of them out."
            )
        if self.time is not None and self.mode == BLOCK_DISTILL:
            raise ValueError(
                f"time={self.time!r} cannot be combined with mode='block_distill'; set tokens, such as tokens='1M'."
            )

    def _check_documents(self) -> None:
        if not self.separate_documents:
            return
        if self.mode == BLOCK_DISTILL:
            raise ValueError("separate_documents=True cannot be combined with mode='block_distill'.")
        if self.teacher_cache:
            raise ValueError(
                f"separate_documents=True cannot be combined with teacher_cache={self.teacher_cache!r}, which does "
                f"not store where documents begin."
            )

    def _check_held_out(self) -> None:
        if self.held_out is not None and not 0 < self.held_out <= 0.5:
            raise ValueError(f"held_out must be above 0 and at most 0.5; got {self.held_out}.")
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError(f"early_stopping must be at least 1; got {self.early_stopping}.")
        if self.early_stopping is not None and self.mode == BLOCK_DISTILL and self.then is None:
            raise ValueError(
                f"early_stopping={self.early_stopping} cannot be combined with mode='block_distill', which judges "
                f"every block before and after its training, unless then trains the whole model afterwards."
            )

    def _check_blocks(self) -> None:
        if self.mode != BLOCK_DISTILL:
            if self.then is not None:
                raise ValueError(f"then={self.then!r} needs mode='block_distill'; the mode is {self.mode!r} here.")
            return
        if self.then not in (None, *WHOLE):
            raise ValueError(f"then must be one of {', '.join(WHOLE)}; got {self.then!r}.")
        if self.then is None and self.adapters:
            raise ValueError(
                "adapters=True cannot be combined with mode='block_distill', which trains all weights of a block, "
                "unless then='lora' or then='distill' trains adapters afterwards."
            )
        if self.then is None and self.teacher_cache:
            raise ValueError(
                "teacher_cache stores predictions, and mode='block_distill' compares hidden states. Leave it out."
            )
        if self.hidden_states_gb is not None and self.hidden_states_gb < 0:
            raise ValueError(f"hidden_states_gb must be at least 0; got {self.hidden_states_gb}.")

    @property
    def trained(self) -> str:
        """What is trained: `"adapters"`, all `"weights"` at once, or those of `"blocks"`."""
        if self.mode == BLOCK_DISTILL:
            return BLOCKS
        return ADAPTERS if self.trains_adapters else WEIGHTS

    @property
    def trains_adapters(self) -> bool:
        """Whether LoRA adapters are trained and not all weights."""
        if self.mode == BLOCK_DISTILL:
            return False
        return self.mode != FULL if self.adapters is None else self.adapters
