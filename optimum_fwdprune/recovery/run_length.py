"""Turning a budget in tokens or in time into a number of steps, with an estimate of how long they take."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from ..architectures.positions import positions_of
from ..runs import ranks
from ..runs.clock import synchronize
from ..runs.progress import announce
from ..runs.randomness import random_states_kept, seeded_generator
from .amounts import Wanted, wanted_by
from .arguments import RecoveryArguments
from .budgets import in_words, seconds_of, steps_for_time, steps_for_tokens, tokens_of
from .distillation import Teacher
from .precision import trained_in_float32
from .sequences import sequence_length
from .trainer import RecoveryTrainer


# A step of the optimizer is not measured, since it would change the weights. It takes less than this share of a step.
OPTIMIZER_SHARE = 0.1


class Budget:
    """The budget of a training of the whole model: `tokens`, `time`, or neither.

    Args:
        trained (`PreTrainedModel` or `PeftModel`): the model that is trained; its weights are not changed here.
        args (`RecoveryArguments`): `tokens`, `time` and the batch sizes.
        teacher (`Teacher`, *optional*): a teacher in memory, which takes part in every step.
    """

    def __init__(self, trained: Any, args: RecoveryArguments, teacher: Teacher | None = None):
        self._args = args
        self._config = trained.config.get_text_config()
        self._length = sequence_length(args, positions_of(self._config))
        self._sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._seconds = 0.0
        if self.is_set:
            # All processes take the same number of steps.
            own = torch.tensor(self._seconds_per_step(trained, teacher), dtype=torch.float64)
            self._seconds = float(ranks.gathered(own).max())

    @property
    def is_set(self) -> bool:
        """Whether there is a budget in tokens or in time, and no number of steps yet."""
        return (self._args.tokens is not None or self._args.time is not None) and self._args.max_steps <= 0

    def wanted(self) -> Wanted:
        """Return how much of the data is read."""
        if not self.is_set or self._args.time is None:
            return wanted_by(self._args, self._args.held_out)
        # Held-out sequences are not trained on.
        more = 1 / (1 - (self._args.held_out or 0.0))
        # Every sequence is at most as long as those that the step was measured on.
        steps = int(seconds_of(str(self._args.time)) / self._seconds)
        return Wanted(tokens=math.ceil(more * max(1, steps) * self._sequences * self._length))

    def spent_on(self, data: Dataset) -> RecoveryArguments:
        """Return the arguments with the number of steps that the budget pays for, and show the estimate.

        Raises:
            ValueError: where the data would be read too often, or the time is not enough for a step.
        """
        if not self.is_set:
            return self._args
        available = sum(len(row) for row in data.with_format("numpy")["input_ids"])
        per_step = self._sequences * available / len(data)
        if self._args.tokens is not None:
            steps = steps_for_tokens(tokens_of(self._args.tokens), available, per_step)
        else:
            steps = steps_for_time(seconds_of(str(self._args.time)), self._seconds, available, per_step)
        announce(
            f"Training for {steps.steps:,} steps, which read about {steps.tokens:,} tokens ({steps.passes:.1f} passes "
            f"over the data), in about {in_words(steps.steps * self._seconds)}."
        )
        args = copy.copy(self._args)
        args.max_steps = steps.steps
        return args

    def _seconds_per_step(self, trained: Any, teacher: Teacher | None) -> float:
        """Measure a forward and a backward pass over random tokens."""
        args = copy.copy(self._args)
        # There is no data yet.
        args.eval_strategy = IntervalStrategy.NO
        generator = seeded_generator(args.seed)
        shape = (args.train_batch_size, self._length)
        ids = torch.randint(0, self._config.vocab_size, shape, generator=generator).to(args.device)
        with random_states_kept(), trained_in_float32(trained):
            trainer = RecoveryTrainer(model=trained, args=args, teacher=teacher, distills=teacher is not None)
            model: Any = trainer.model.train()  # type: ignore[union-attr]
            seconds = 0.0
            # The first pass also allocates memory.
            for _ in range(2):
                start = time.monotonic()
                # A model that is trained is wrapped in it.
                with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
                loss.backward()
                model.zero_grad(set_to_none=True)
                synchronize(args.device)
                seconds = time.monotonic() - start
        return seconds * args.gradient_accumulation_steps * (1 + OPTIMIZER_SHARE)


class TimeLimit(TrainerCallback):
    """Ends the training once its time is over.

    Args:
        seconds (`float`): the time.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self._start > self._seconds:
            control.should_training_stop = True


def resumed_with_same_steps(args: RecoveryArguments, resumed: str | None) -> RecoveryArguments:
    """Return arguments with the number of steps of the run that is resumed, where a time was its budget.

    Args:
        args (`RecoveryArguments`): the arguments.
        resumed (`str`, *optional*): the checkpoint to resume from.
    """
    if resumed is None or args.time is None:
        return args
    state = json.loads((Path(resumed) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    args = copy.copy(args)
    args.max_steps = int(state["max_steps"])
    return args
