"""`RecoveryRequest`: how a model is trained after every round of a pruning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .arguments import RecoveryArguments


@dataclass(frozen=True, eq=False)
class RecoveryRequest:
    """The arguments of [`~optimum_fwdprune.pruner.FwdPruner.recover`] as one object, for
    [`~optimum_fwdprune.pruner.FwdPruner.prune_and_recover`].

    ```python
    arguments = RecoveryArguments(output_dir="training", mode="distill", tokens="1M")
    pruner.prune_and_recover(RecoveryRequest("wikitext2", arguments), sparsity=0.4, rounds=3)
    ```

    Args:
        dataset: text, chats or instructions: a file, a dataset of the Hub or in memory, strings, token ids; see
            [`~optimum_fwdprune.recovery.training_data`].
        args (`RecoveryArguments`, *optional*): arguments of one training; the default trains and merges adapters.
            Amounts such as `tokens` and `max_steps` are those of one round.
        teacher (`PreTrainedModel`, `str` or `Path`, *optional*): for modes that distill; by default the dense model.
        eval_dataset (*optional*): held-out data, for the Trainer's `eval_strategy`.
        callbacks (`list` of `TrainerCallback`, *optional*): the Trainer's, which every training gets.
    """

    dataset: Any
    args: RecoveryArguments | None = None
    teacher: PreTrainedModel | str | Path | None = None
    eval_dataset: Any = None
    callbacks: list[Any] | None = None
