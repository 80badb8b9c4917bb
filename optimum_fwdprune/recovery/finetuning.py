"""The training of a pruned model: with adapters or of all weights, on text alone or towards the dense model too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..loading.saving import check_savable
from ..runs.locks import held, taking_turns
from ..runs.randomness import random_states_kept
from .adapters import merged, with_adapters
from .arguments import RecoveryArguments
from .callbacks import check_evaluations, checked_callbacks
from .data import TrainingTexts, training_data
from .distillation import Teacher, identity_of_teacher, keep_predictions, kept_predictions
from .options import DISTILL
from .restoring import ModelState, left_as_it_was, removed_where_unused
from .resuming import check_resumable, checkpoint_of
from .teachers import TeacherSource, find_teacher
from .trainer import RecoveryTrainer


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    args: RecoveryArguments,
    *,
    eval_dataset: Any = None,
    **options: Any,
) -> tuple[Any, RecoveryTrainer]:
    """Train a pruned model on a dataset, with its tokenizer; see [`train`] for the rest.

    Args:
        model (`PreTrainedModel`): pruned or not; it is trained in place.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for all data but token ids.
        dataset: text, chats, instructions or token ids, see [`training_data`].
        args (`RecoveryArguments`): how.
        eval_dataset (*optional*): of the same kinds, for `eval_strategy`.
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
    """Train a pruned model: adapters or all weights, by the text alone or towards the dense model too.

    However it ends, the model's modes, hooks, frozen parameters, config and generation config, the random number
    generators and a teacher in memory are as they were. Where it fails, adapters are taken out again: the weights are
    those of before, or, where all of them are trained, what training had made of them.

    Args:
        model (`PreTrainedModel`): pruned or not; it is trained in place.
        texts (`TrainingTexts`): what it is trained on, with the tokenizer that is saved beside it.
        args (`RecoveryArguments`): how.
        teacher (`PreTrainedModel`, `PeftModel`, `str`, `Path` or `Origin`, *optional*): for `mode="distill"`: the
            dense model, or what to load it from where `args.teacher` does not say.
        callbacks (`TrainerCallback` or iterable of these, *optional*): the Trainer's.
        access (mapping, *optional*): for loading a teacher by name: `token`, `trust_remote_code` and the like.

    Returns:
        the trained model, in eval mode: a plain one, or a `PeftModel` where `args.merge_adapters` is off; and the
        trainer, whose `state.log_history` says how it went.

    Raises:
        ValueError: where the data, the teacher or a checkpoint to resume from does not fit, or the model or its
            tokenizer could not be saved.
    """
    check_savable(model, texts.tokenizer)
    callbacks = checked_callbacks(callbacks)
    check_evaluations(args, texts.eval_dataset, callbacks)
    if texts.eval_dataset is not None and args.mode == DISTILL and args.teacher_cache is not None:
        raise ValueError("teacher_cache keeps no predictions for eval_dataset; leave one of them out.")
    _check_weights(model, args)
    resumed = checkpoint_of(args)
    source = find_teacher(model, args, teacher, access)
    adapters_stay = args.trains_adapters and not args.merge_adapters
    before = ModelState(model)
    in_memory = None if source is None else source.model
    # The Trainer writes its checkpoints to this folder.
    folder = str(args.output_dir)
    with (
        random_states_kept(),
        left_as_it_was(in_memory),
        removed_where_unused(folder),
        held(folder, "another one as output_dir"),
    ):
        try:
            # Names of linears and a checkpoint are checked before data is read.
            trained = _trainable(model, args)
            if resumed is not None:
                check_resumable(resumed, trained, args)
            trainer = _trainer(model, trained, texts, args, source, callbacks)
            assert trainer.model is not None
            with _steps_reach_the_weights(trainer.model):
                trainer.train(resume_from_checkpoint=resumed)
            trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            if args.trains_adapters and args.merge_adapters:
                trained = merged(trained)
        except BaseException:
            before.put_back()
            raise
        before.put_back(adapters_stay)
    return trained.eval(), trainer


def _check_weights(model: PreTrainedModel, args: RecoveryArguments) -> None:
    """Raise `ValueError` where a step could change no weight."""
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


def _trainable(model: PreTrainedModel, args: RecoveryArguments) -> Any:
    """The model as it is trained: with new adapters where these are."""
    if not args.trains_adapters:
        return model
    # New adapters are drawn before the Trainer sets its seed.
    set_seed(args.seed)
    adapted = with_adapters(model, args)
    if args.gradient_checkpointing:
        # The embeddings are frozen, and what follows needs gradients to reach it.
        adapted.enable_input_require_grads()
    return adapted


def _trainer(
    model: PreTrainedModel,
    trained: Any,
    texts: TrainingTexts,
    args: RecoveryArguments,
    source: TeacherSource | None,
    callbacks: list[TrainerCallback],
) -> RecoveryTrainer:
    """Read the data, ask for the teacher, and return what trains the model."""
    longest = getattr(model.config, "max_position_embeddings", None)
    limits = {"longest": longest, "vocab_size": model.config.get_text_config().vocab_size}
    data = training_data(texts.dataset, texts.tokenizer, args, _sequences_of(args), **limits)
    held_out = None
    if texts.eval_dataset is not None:
        held_out = training_data(texts.eval_dataset, texts.tokenizer, args, **limits)
    live = None
    if source is not None:
        data, live = _taught(data, model, args, source)
    return RecoveryTrainer(
        model=trained,
        args=args,
        teacher=live,
        distills=source is not None,
        train_dataset=data.with_format("torch"),
        eval_dataset=None if held_out is None else held_out.with_format("torch"),
        processing_class=texts.tokenizer,
        callbacks=callbacks,
    )


@contextmanager
def _steps_reach_the_weights(model: torch.nn.Module) -> Iterator[None]:
    """Hold what is trained in float32 while the context is open: a 16-bit weight rounds most steps away."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtypes = [parameter.dtype for parameter in trained]
    # The parameters alone: buffers such as rotary frequencies are float32 whatever the model's dtype.
    for parameter in trained:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in zip(trained, dtypes):
            parameter.data = parameter.data.to(dtype)


def _sequences_of(args: RecoveryArguments) -> int | None:
    """How many sequences a run of so many steps reads, so that a stream is not read further."""
    if args.max_steps <= 0:
        return None
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _taught(
    data: Dataset, student: PreTrainedModel, args: RecoveryArguments, source: TeacherSource
) -> tuple[Dataset, Teacher | None]:
    """The data with what the teacher predicts, or the teacher itself."""
    if args.teacher_cache is None:
        return data, Teacher(source.load(student, args, args.device), hidden_states=args.hidden_weight > 0)
    identity = identity_of_teacher(data, source.identity, args.teacher_top_k)
    # One process asks, the others find the answers.
    with args.main_process_first(desc="asking the teacher"):
        kept = kept_predictions(args.teacher_cache, identity)
        if kept is None:
            with taking_turns(args.teacher_cache):
                # Another run may have written them meanwhile.
                kept = kept_predictions(args.teacher_cache, identity)
                if kept is None:
                    teacher = Teacher(source.load(student, args, args.device))
                    kept = keep_predictions(data, teacher, args.teacher_cache, identity, args.train_batch_size)
    return kept, None
