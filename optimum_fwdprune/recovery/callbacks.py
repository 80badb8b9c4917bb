"""Checks of the Trainer's callbacks, made before a run that they would otherwise interrupt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from .arguments import RecoveryArguments


# The metrics of an evaluation during training.
MEASURED = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def checked_callbacks(callbacks: Any) -> list[TrainerCallback]:
    """Return callbacks as a list of objects.

    Args:
        callbacks (`TrainerCallback`, its class, or an iterable of these, *optional*): callbacks as the user passed
            them.

    Raises:
        ValueError: where a callback is something else, or a class that cannot be called without arguments.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, (TrainerCallback, type, str, Mapping)) or not isinstance(callbacks, Iterable):
        callbacks = [callbacks]
    return [_callback(callback) for callback in callbacks]


def _callback(callback: Any) -> TrainerCallback:
    kind = callback if isinstance(callback, type) else type(callback)
    if not issubclass(kind, TrainerCallback):
        raise ValueError(
            f"callbacks must be objects or subclasses of transformers.TrainerCallback, such as "
            f"EarlyStoppingCallback(3); got a {kind.__name__}."
        )
    if kind is not callback:
        return callback
    try:
        return kind()
    except TypeError as error:
        raise ValueError(f"{kind.__name__} needs arguments ({error}); pass an instance of it.") from error


def check_evaluations(args: RecoveryArguments, eval_dataset: Any, callbacks: Iterable[TrainerCallback]) -> None:
    """Raise `ValueError` where evaluations during training lack their data, or callbacks lack evaluations.

    Args:
        args (`RecoveryArguments`): `eval_strategy` and `metric_for_best_model`.
        eval_dataset (*optional*): held-out data.
        callbacks (iterable of `TrainerCallback`): the Trainer's callbacks.
    """
    strategy, metric = IntervalStrategy(args.eval_strategy), args.metric_for_best_model
    if eval_dataset is None and args.held_out is None and strategy != IntervalStrategy.NO:
        raise ValueError(
            f"eval_strategy={strategy.value!r} needs an eval_dataset, or held_out=0.05, which holds out a share of "
            f"the data."
        )
    if eval_dataset is not None and args.held_out is not None:
        raise ValueError(f"held_out={args.held_out} cannot be combined with an eval_dataset; leave one of them out.")
    if any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks) and (
        strategy == IntervalStrategy.NO or metric is None
    ):
        raise ValueError(
            "EarlyStoppingCallback compares evaluations: set eval_strategy='steps' or 'epoch' and "
            "metric_for_best_model='eval_loss', and pass an eval_dataset."
        )
    evaluates = strategy != IntervalStrategy.NO
    if evaluates and metric is not None and f"eval_{metric.removeprefix('eval_')}" not in MEASURED:
        raise ValueError(
            f"metric_for_best_model={metric!r} is not measured; an evaluation during training measures "
            f"{', '.join(MEASURED)}."
        )


def check_block_stages(stages: list[RecoveryArguments], eval_dataset: Any, callbacks: list[TrainerCallback]) -> None:
    """Raise `ValueError` where a training by blocks, and what follows it, cannot follow its arguments.

    Args:
        stages (`list[RecoveryArguments]`): the arguments of the blocks and, if there is one, of the stage after them.
        eval_dataset (*optional*): held-out data.
        callbacks (`list[TrainerCallback]`): the Trainer's callbacks.
    """
    if len(stages) > 1:
        check_evaluations(stages[-1], eval_dataset, callbacks)
        return
    if callbacks or IntervalStrategy(stages[0].eval_strategy) != IntervalStrategy.NO:
        raise ValueError(
            "callbacks and eval_strategy are the Trainer's, which does not train blocks: every block is judged on "
            "held-out data before and after it is trained. Leave them out, or set then='distill'."
        )
