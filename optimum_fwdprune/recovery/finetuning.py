"""The training of a pruned model: with adapters or of all weights, on text alone or towards the dense model too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..loading.saving import check_savable
from ..runs.locks import held, taking_turns
from ..runs.loggers import get_logger
from ..runs.products import products_in_float32
from ..runs.randomness import random_states_kept
from .adapters import merged, with_adapters
from .amounts import held_out_evenly
from .arguments import RecoveryArguments
from .budgets import seconds_of
from .callbacks import check_evaluations, checked_callbacks
from .data import TrainingTexts, limits_of, training_data
from .distillation import Teacher, identity_of_teacher, keep_predictions, kept_predictions
from .documents import check_separates_documents
from .options import DISTILL
from .precision import trained_in_float32
from .restoring import ModelState, left_as_it_was, removed_where_unused
from .resuming import asks_to_resume, check_resumable, checkpoint_of, steps_of
from .run_length import Budget, TimeLimit, resumed_with_same_steps
from .self_written import check_self_written
from .teachers import TeacherSource, find_teacher
from .trainer import RecoveryTrainer


logger = get_logger(__name__)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    args: RecoveryArguments,
    *,
    eval_dataset: Any = None,
    **options: Any,
) -> tuple[Any, RecoveryTrainer]:
    """Train a pruned model on a dataset, with its tokenizer; see [`train`] for results and errors.

    Args:
        model (`PreTrainedModel`): model to train in place, pruned or not.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required unless the data are token ids.
        dataset: text, chats, instructions or token ids, see [`training_data`].
        args (`RecoveryArguments`): arguments of the training.
        eval_dataset (*optional*): held-out data for `eval_strategy`, of the same kinds.
        options: `teacher`, `callbacks` and `access` of [`train`].
    """
    return train(model, TrainingTexts(dataset, tokenizer, eval_dataset), args, **options)


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: PreTrainedModel,
    texts: TrainingTexts,
    args: RecoveryArguments,
    *,
    teacher: Any = None,
    callbacks: Any = None,
    access: Mapping[str, Any] | None = None,
) -> tuple[Any, RecoveryTrainer]:
    """Train a pruned model, with adapters or in all weights, on text alone or also towards the dense model.

    The model's modes, hooks, frozen parameters, config and generation config, the random number generators and a
    teacher in memory are restored afterwards, also if training fails. If it fails, adapters are removed, which leaves
    the weights as they were before; a training of all weights leaves them as of its last step.

    Args:
        model (`PreTrainedModel`): model to train in place, pruned or not.
        texts (`TrainingTexts`): training data, with the tokenizer that is saved with the model.
        args (`RecoveryArguments`): arguments of the training.
        teacher (`PreTrainedModel`, `PeftModel`, `str`, `Path` or `Origin`, *optional*): for `mode="distill"`, the
            dense model, or a name or place to load it from. `args.teacher` replaces an `Origin`.
        callbacks (`TrainerCallback` or iterable of these, *optional*): callbacks of the Trainer.
        access (mapping, *optional*): `token`, `trust_remote_code` and the like, for loading a teacher by name.

    Returns:
        the trained model in eval mode, which is a `PeftModel` where `args.merge_adapters` is off; and the trainer,
        whose `state.log_history` holds the log.

    Raises:
        ValueError: where the data, the teacher or a checkpoint to resume from does not fit the model, or the model or
            its tokenizer could not be saved.
    """
    callbacks = checked_callbacks(callbacks)
    check_training(model, texts, args, callbacks)
    resumed = checkpoint_of(args)
    args = resumed_with_same_steps(args, resumed)
    source = find_teacher(model, args, teacher, access)
    adapters_stay = args.trains_adapters and not args.merge_adapters
    before = ModelState(model)
    in_memory = None if source is None else source.model
    # The folder of the Trainer's checkpoints.
    folder = str(args.output_dir)
    with (
        random_states_kept(),
        left_as_it_was(in_memory),
        removed_where_unused(folder),
        held(folder, "another one as output_dir"),
    ):
        try:
            # The names of linears and the checkpoint are checked before data is read, which may take long.
            trained = trainable(model, args)
            if resumed is not None:
                check_resumable(resumed, trained, args)
            trainer = _trainer(model, trained, texts, args, source, callbacks)
            assert trainer.model is not None
            with trained_in_float32(trainer.model), products_in_float32():
                # The Trainer may remove the checkpoint that it resumed from.
                steps = None if resumed is None else steps_of(resumed)
                trainer.train(resume_from_checkpoint=resumed)
            if steps is not None and steps == trainer.state.global_step:
                _warn_of_nothing_left(resumed, steps)
            trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            if args.trains_adapters and args.merge_adapters:
                trained = merged(trained)
        except BaseException:
            before.put_back()
            raise
        before.put_back(adapters_stay)
    return trained.eval(), trainer


def check_training(
    model: PreTrainedModel, texts: TrainingTexts, args: RecoveryArguments, callbacks: list[TrainerCallback]
) -> None:
    """Raise `ValueError` where a training cannot follow its arguments, or could change or save no weight.

    The arguments are those of [`train`].
    """
    check_savable(model, texts.tokenizer)
    check_self_written(texts.is_self_written, args)
    check_evaluations(args, texts.eval_dataset, callbacks)
    if texts.eval_dataset is not None and args.mode == DISTILL and args.teacher_cache is not None:
        raise ValueError("teacher_cache keeps no predictions for eval_dataset; leave one of them out.")
    check_weights(model, args)


def check_weights(model: PreTrainedModel, args: RecoveryArguments) -> None:
    """Raise `ValueError` where training could change no weight."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "Weights of the model were made under torch.inference_mode, and cannot be trained. Load and prune the "
            "model outside of it."
        )
    if not args.trains_adapters and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"All parameters of the model are frozen, and mode={args.mode!r} without adapters would train none. Call "
            f"pruner.model.requires_grad_(True), or train adapters with mode='lora'."
        )


def trainable(model: PreTrainedModel, args: RecoveryArguments) -> Any:
    """Return the model to train, with new adapters if these are trained."""
    if not args.trains_adapters:
        return model
    # New adapters are initialized before the Trainer sets its seed.
    set_seed(args.seed)
    adapted = with_adapters(model, args)
    if args.gradient_checkpointing:
        # The embeddings are frozen. Checkpointed layers need an input with a gradient to compute those of adapters.
        adapted.enable_input_require_grads()
    return adapted


def _warn_of_nothing_left(checkpoint: str | None, steps: int) -> None:
    """Warn where a checkpoint was that of the last step, so that nothing was trained."""
    logger.warning(
        "%s is the checkpoint of the last step, %d, so that nothing was left to train: the model has the weights of "
        "this checkpoint. Raise max_steps, num_train_epochs or tokens to train it further.",
        checkpoint,
        steps,
    )


def _trainer(
    model: PreTrainedModel,
    trained: Any,
    texts: TrainingTexts,
    args: RecoveryArguments,
    source: TeacherSource | None,
    callbacks: list[TrainerCallback],
) -> RecoveryTrainer:
    """Read the data, load the teacher or its stored predictions, and return the trainer."""
    live = None
    has_budget = args.tokens is not None or args.time is not None
    if source is not None and (texts.is_self_written or (has_budget and args.teacher_cache is None)):
        # It writes text, or takes part in the steps that are measured.
        live = _teacher(model, args, source)
        texts = texts.written_by(live.model, source.identity, args)
        if args.teacher_cache is not None:
            live = None
    if args.separate_documents:
        check_separates_documents(model, "the pruned model")
        if source is not None:
            live = live or _teacher(model, args, source)
            check_separates_documents(live.model, "the teacher")
    budget = Budget(trained, args, live)
    limits = limits_of(model)
    data = training_data(texts.dataset, texts.tokenizer, args, budget.wanted(), **limits)
    training, held_out = held_out_evenly(len(data), args.held_out)
    args = budget.spent_on(data.select(training))
    if args.time is not None and not asks_to_resume(args):
        callbacks = [*callbacks, TimeLimit(seconds_of(args.time))]
    if source is not None and live is None:
        data, live = _taught(data, model, args, source)
    evaluated = data.select(held_out) if held_out else None
    if texts.eval_dataset is not None:
        evaluated = training_data(texts.eval_dataset, texts.tokenizer, args, **limits)
    if args.early_stopping is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(args.early_stopping)]
    return RecoveryTrainer(
        model=trained,
        args=args,
        teacher=live,
        distills=source is not None,
        train_dataset=data.select(training).with_format("torch"),
        eval_dataset=None if evaluated is None else evaluated.with_format("torch"),
        processing_class=texts.tokenizer,
        callbacks=callbacks,
    )


def _teacher(student: PreTrainedModel, args: RecoveryArguments, source: TeacherSource) -> Teacher:
    return Teacher(source.load(student, args, args.device), hidden_states=args.hidden_weight > 0)


def _taught(
    data: Dataset, student: PreTrainedModel, args: RecoveryArguments, source: TeacherSource
) -> tuple[Dataset, Teacher | None]:
    """Return the data with the teacher's stored predictions and `None`, or the data as it is and the teacher."""
    if args.teacher_cache is None:
        return data, _teacher(student, args, source)
    identity = identity_of_teacher(data, source.identity, args.teacher_top_k)
    # One process stores the predictions, and the others read them.
    with args.main_process_first(desc="predicting with the teacher"):
        kept = kept_predictions(args.teacher_cache, identity)
        if kept is None:
            with taking_turns(args.teacher_cache):
                # Another run may have written them meanwhile.
                kept = kept_predictions(args.teacher_cache, identity)
                if kept is None:
                    teacher = Teacher(source.load(student, args, args.device))
                    kept = keep_predictions(data, teacher, args.teacher_cache, identity, args.train_batch_size)
    return kept, None
