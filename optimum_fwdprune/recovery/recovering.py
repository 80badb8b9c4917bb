"""The recovery of a pruned model: it is checked, run, and recorded, also if it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..architectures import is_pruned
from ..architectures.wrapping import check_no_adapters, is_peft_model
from ..loading.offloading import is_offloaded, lies_on_disk
from ..loading.origin import Origin
from ..loading.source import Source
from ..loading.state import check_not_consumed, forward_state_kept
from ..record.record import Record
from ..runs.loggers import get_logger
from .arguments import RecoveryArguments
from .blockwise.distillation import BlockDistillation
from .callbacks import check_block_stages, checked_callbacks
from .data import TrainingTexts
from .finetuning import train
from .options import BLOCK_DISTILL, TAUGHT
from .resuming import asks_to_resume
from .trainer import RecoveryTrainer, StepCounter, frozen_share


logger = get_logger(__name__)


class Recovery:
    """Trains a pruned model, and keeps its record and source up to date.

    Args:
        model (`PreTrainedModel`): the pruned model.
        record (`Record`): how it was pruned.
        source (`Source`): where it came from, and where it was saved.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`): the model in its current state.
        record (`Record`): the record; once weights were changed, it includes how the model was trained.
        source (`Source`): the source; once weights were changed, it no longer names a folder where they are saved.
        trainer (`RecoveryTrainer`, *optional*): the trainer, once training has ended.
        has_changed (`bool`): whether the model differs from the one that was pruned, also if training failed.
    """

    def __init__(self, model: Any, record: Record, source: Source):
        self.model = model
        self.record = record
        self.source = source
        self.trainer: RecoveryTrainer | None = None
        self.has_changed = False
        self._command: dict[str, list[str]] | None = None

    def run(
        self,
        texts: TrainingTexts,
        args: RecoveryArguments | None = None,
        teacher: PreTrainedModel | str | Path | Origin | None = None,
        callbacks: Any = None,
    ) -> None:
        """Train the model.

        Args:
            texts (`TrainingTexts`): training data.
            args (`RecoveryArguments`, *optional*): arguments of the training; by default those with all defaults.
            teacher (`PreTrainedModel`, `str`, `Path` or `Origin`, *optional*): for modes that distill; by default the
                model that was pruned.
            callbacks (`TrainerCallback` or iterable of these, *optional*): callbacks of the Trainer.

        Raises:
            TypeError: where `args` are no `RecoveryArguments`.
            ValueError: before training starts, where the model, the data, the teacher or a checkpoint to resume from
                does not fit.
        """
        check_trainable(self.model, self.record)
        args = checked_arguments(args)
        stages, callbacks = args.stages(), checked_callbacks(callbacks)
        check_placement(self.model, stages, self.source.low_memory)
        self._check_adapters(stages)
        self._command = _command(texts, args, teacher, callbacks)
        if teacher is None and self.record.plan is not None:
            teacher = Origin.of_plan(self.record.plan.metadata, self.source.folders)
        if stages[0].mode != BLOCK_DISTILL:
            self._train_whole(texts, args, teacher, callbacks)
            return
        check_block_stages(stages, texts.eval_dataset, callbacks)
        # The data is read once for every stage.
        texts = texts.kept_for_reading_again()
        is_resumed_whole = self._train_blocks(texts, stages[0], teacher)
        if is_resumed_whole and len(stages) == 1:
            logger.warning(
                "The run in %s had trained all blocks, so that nothing was left to train: the model has the weights "
                "of that run. Leave out resume_from_checkpoint to train it further.",
                args.output_dir,
            )
        for stage in stages[1:]:
            self._train_whole(texts, stage, teacher if stage.mode in TAUGHT else None, callbacks)

    def _check_adapters(self, stages: list[RecoveryArguments]) -> None:
        """Raise `ValueError` where adapters would be saved without the weights that they belong to."""
        last = stages[-1]
        if not last.trains_adapters or last.merge_adapters:
            return
        if len(stages) > 1:
            raise ValueError(
                f"merge_adapters=False saves adapters without their base, whose weights mode={BLOCK_DISTILL!r} "
                f"changes. Leave it on, or train and save in two steps."
            )
        if self.source.saved_as is None:
            raise ValueError(
                "Adapters are saved without their base, and the pruned model has not been saved yet: call "
                "save_pretrained first, or leave merge_adapters on."
            )

    def _train_blocks(self, texts: TrainingTexts, args: RecoveryArguments, teacher: Any) -> bool:
        """Train all blocks, and return whether an earlier run that was resumed had done so."""
        distillation = BlockDistillation(self.model, self.record.plan, self.source)
        try:
            with forward_state_kept(self.model):
                distillation.run(texts, args, teacher)
        except BaseException as error:
            if distillation.has_changed_weights:
                stopped = {**distillation.summary(), "dataset": texts.name, "interrupted by": type(error).__name__}
                self._note(stopped, args)
            raise
        self.model = distillation.model
        self._note({**distillation.summary(), "dataset": texts.name}, args)
        return distillation.is_resumed_whole

    def _train_whole(self, texts: TrainingTexts, args: RecoveryArguments, teacher: Any, callbacks: list[Any]) -> None:
        keeps_adapters = args.trains_adapters and not args.merge_adapters
        counter = StepCounter()
        access = self.source.access
        try:
            with forward_state_kept(self.model):
                self.model, self.trainer = train(
                    self.model, texts, args, teacher=teacher, callbacks=[counter, *callbacks], access=access
                )
        except BaseException as error:
            if counter.steps and not args.trains_adapters:
                # The steps before the error changed the weights, so that the record must not claim what was measured.
                stopped = {"mode": args.mode, "adapters": False, **frozen_share(self.model, trains_adapters=False)}
                stopped |= {"steps": counter.steps, "dataset": texts.name}
                self._note({**stopped, "interrupted by": type(error).__name__}, args)
            raise
        summary = {**self.trainer.summary(), "dataset": texts.name}
        if keeps_adapters:
            self.model.peft_config["default"].base_model_name_or_path = self.source.saved_as
        self._note(summary, args, has_new_weights=not keeps_adapters)

    def _note(self, summary: Mapping[str, Any], args: RecoveryArguments, has_new_weights: bool = True) -> None:
        """Record how the model was trained, and drop the measurements and the saved place of the former weights."""
        self.has_changed = True
        now = {**summary, "command": self._command}
        recovery = followed_by(self.record.recovery, now, is_resumed=asks_to_resume(args))
        self.record = replace(self.record, recovery=recovery, comparison=None)
        if has_new_weights:
            self.source = self.source.not_saved()
            self.record.leave_with(self.model)


def _command(
    texts: TrainingTexts, args: RecoveryArguments, teacher: Any, callbacks: list[Any]
) -> dict[str, list[str]] | None:
    """Return the sources of the data and the arguments as words of the command line; `None` where it cannot name the
    data, or the teacher or callbacks were passed in Python."""
    data = texts.on_command_line()
    if data is None or teacher is not None or args.teacher is not None or callbacks:
        return None
    return {"data": data, "arguments": args.on_command_line()}


def followed_by(before: Mapping[str, Any] | None, now: dict[str, Any], is_resumed: bool) -> dict[str, Any]:
    """Return the record of a training, with those before it under `"earlier"`.

    Args:
        before (mapping, *optional*): the record of the training before.
        now (`dict`): the record of this training.
        is_resumed (`bool`): whether this training resumed one of the same mode, which it then replaces.
    """
    if before is None:
        return now
    earlier = list(before.get("earlier", ()))
    if not (is_resumed and before.get("mode") == now["mode"]):
        earlier.append({name: value for name, value in before.items() if name != "earlier"})
    return {**now, "earlier": earlier} if earlier else now


def check_trainable(model: Any, record: Record) -> None:
    """Raise `ValueError` where recovery cannot train a model, or could not save it afterwards."""
    check_can_be_trained(model)
    if record.plan is None and not is_pruned(model.config):
        raise ValueError(
            f"recover trains a pruned model, and this {type(model).__name__} is dense: prune it first. "
            f"transformers.Trainer trains dense models."
        )


def check_can_be_trained(model: Any) -> None:
    """Raise `ValueError` where a model cannot be trained as a language model without adapters of its own."""
    check_not_consumed(model)
    if is_peft_model(model):
        raise ValueError(
            "pruner.model has adapters of an earlier training. Merge them first: "
            "pruner.model = pruner.model.merge_and_unload()."
        )
    check_no_adapters(model, "recover would train instead of its own")
    if not model.can_generate():
        raise ValueError(
            f"recover trains with the next-token loss, and a {type(model).__name__} predicts no tokens. Train it "
            f"with transformers.Trainer and the labels of its task, then call save_pretrained of this pruner."
        )


def check_placement(model: PreTrainedModel, stages: list[RecoveryArguments], low_memory: bool) -> None:
    """Raise `ValueError` where training could not change the layers of a model, since they are offloaded.

    Args:
        model (`PreTrainedModel`): the pruned model.
        stages (`list[RecoveryArguments]`): the arguments of every stage.
        low_memory (`bool`): whether the model was opened with `low_memory`, so that training by blocks writes new
            files of its layers.
    """
    by_blocks = all(stage.mode == BLOCK_DISTILL for stage in stages)
    if not is_offloaded(model) or (by_blocks and low_memory and lies_on_disk(model)):
        return
    if stages[0].mode == BLOCK_DISTILL and low_memory:
        raise ValueError(
            f"then={stages[-1].mode!r} trains the whole model, and layers of this model are on disk. Leave it out; or "
            f"save the model with save_pretrained, load it without low_memory, and then call recover."
        )
    raise ValueError(
        "Layers of this model are offloaded to the disk or to the CPU, where training would not change them. Save the "
        "model with save_pretrained and load it without low_memory, and without a device_map that offloads; then call "
        "recover. mode='block_distill' also trains models that are loaded with low_memory=True."
    )


def checked_arguments(args: Any) -> RecoveryArguments:
    """Return the arguments of a training, by default those with all defaults.

    Raises:
        TypeError: where they are no `RecoveryArguments`.
    """
    if args is None:
        return RecoveryArguments(output_dir="fwdprune_recovery")
    if not isinstance(args, RecoveryArguments):
        raise TypeError(
            f"args must be RecoveryArguments, which extend the Trainer's TrainingArguments; got a "
            f"{type(args).__name__}. Write RecoveryArguments(output_dir=..., ...)."
        )
    return args
