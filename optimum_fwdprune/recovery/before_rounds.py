"""The checks of a recovery after every round of a pruning, which are made before the first round."""

from __future__ import annotations

from transformers import PreTrainedModel, TrainerCallback

from ..loading.source import Source
from ..runs.randomness import random_states_kept
from .amounts import Wanted, held_out_evenly, wanted_by
from .arguments import RecoveryArguments
from .blockwise.distillation import check_blocks, held_out_share
from .budgets import steps_for_tokens, tokens_of
from .data import TrainingTexts, limits_of, training_data
from .documents import check_separates_documents
from .finetuning import check_training, trainable
from .options import BLOCK_DISTILL
from .restoring import ModelState
from .resuming import asks_to_resume
from .sequences import digest_of_sequences


def check_arguments(args: RecoveryArguments, source: Source, rounds: int) -> None:
    """Raise `ValueError` where training after every round cannot follow its arguments.

    Args:
        args (`RecoveryArguments`): the arguments.
        source (`Source`): how the model was opened.
        rounds (`int`): the number of rounds.
    """
    if source.low_memory:
        raise ValueError(
            "prune_and_recover trains models in memory, and low_memory=True leaves the layers of this one on disk. "
            "Load it without low_memory; or call prune and save_pretrained, and then recover with "
            "mode='block_distill', which trains layers on disk."
        )
    if asks_to_resume(args):
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r} names a checkpoint of one training. "
            f"prune_and_recover resumes all rounds with the option resume=FOLDER of the pruning."
        )
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name):
            raise ValueError(
                f"{name} divides the weights among processes, so that no further round could prune them. Call prune, "
                f"save_pretrained and recover one after the other."
            )
    last = args.stages()[-1]
    if last.trains_adapters and not last.merge_adapters:
        raise ValueError(
            "merge_adapters=False leaves adapters in the model, which no further round can prune. Leave it on; or "
            "call prune, save_pretrained and recover one after the other."
        )
    if args.teacher_cache is not None and args.time is not None and rounds > 1:
        raise ValueError(
            f"teacher_cache={args.teacher_cache!r} stores predictions for the same sequences in every round, and with "
            f"time={args.time!r} every round reads another number of them. Set tokens instead, or leave it out."
        )


def check_stage(
    args: RecoveryArguments,
    model: PreTrainedModel,
    texts: TrainingTexts,
    callbacks: list[TrainerCallback],
) -> str:
    """Check one stage of the training, and return a digest of its data.

    Args:
        args (`RecoveryArguments`): arguments of the stage.
        model (`PreTrainedModel`): the model that is pruned. It has the vocabulary, the positions and the names of
            linears of the pruned one.
        texts (`TrainingTexts`): training data.
        callbacks (`list[TrainerCallback]`): callbacks of the Trainer.
    """
    if args.mode == BLOCK_DISTILL:
        check_blocks(model, texts, args)
    else:
        check_training(model, texts, args, callbacks)
    if args.separate_documents:
        check_separates_documents(model, "the model")
    if args.trains_adapters:
        _check_adapters(model, args)
    return _check_data(args, model, texts)


def _check_adapters(model: PreTrainedModel, args: RecoveryArguments) -> None:
    """Raise an error where the model cannot get the adapters; they are removed again."""
    before = ModelState(model)
    try:
        with random_states_kept():
            trainable(model, args)
    finally:
        before.put_back()


def _check_data(args: RecoveryArguments, model: PreTrainedModel, texts: TrainingTexts) -> str:
    """Read the data, without text that the teacher will write, and return a digest of it.

    Raises:
        ValueError: where it cannot be read, or a budget in tokens would read it too often.
    """
    limits = limits_of(model)
    digests = []
    if texts.eval_dataset is not None:
        digests.append(digest_of_sequences(training_data(texts.eval_dataset, texts.tokenizer, args, **limits)))
    readable, share = texts.without_self_written()
    if readable is None:
        return " ".join(digests)
    held_out = args.held_out
    if args.mode == BLOCK_DISTILL:
        held_out = held_out_share(args, texts)
    # The number of steps in a time depends on the pruned model. A few sequences show whether the data can be read.
    wanted = Wanted(sequences=2) if args.time is not None else wanted_by(args, held_out)
    data = training_data(readable, texts.tokenizer, args, wanted.times(share), **limits)
    digests.append(digest_of_sequences(data))
    training, _ = held_out_evenly(len(data), held_out)
    if args.tokens is not None:
        available = sum(len(row) for row in data.select(training).with_format("numpy")["input_ids"])
        steps_for_tokens(tokens_of(args.tokens), round(available / share), per_step=1.0)
    return " ".join(digests)
