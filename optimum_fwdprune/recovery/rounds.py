"""Recovery after every round of a pruning: its checks before the first round, its training, and its states on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading.origin import Origin
from ..loading.source import Source
from ..record.record import Record
from ..runs.resume import Resume, State
from .arguments import RecoveryArguments
from .before_rounds import check_arguments, check_stage
from .blockwise.blocks import layers_compared
from .callbacks import check_block_stages, checked_callbacks
from .data import TrainingTexts
from .options import BLOCK_DISTILL, TAUGHT
from .recovering import Recovery, check_can_be_trained, check_placement, checked_arguments
from .request import RecoveryRequest
from .resuming import state_to_resume
from .teachers import find_teacher
from .trainer import RecoveryTrainer


# Arguments of the Trainer that do not change the trained weights, besides those that begin with one of the prefixes.
IMMATERIAL = (
    "dataloader_num_workers",
    "disable_tqdm",
    "hidden_states_gb",
    "output_dir",
    "project",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "teacher_device_map",
)
IMMATERIAL_PREFIXES = ("hub_", "log_", "logging_", "push_to_hub", "save_", "trackio_")

# Bytes of weights per file of a state.
BYTES_PER_FILE = 2**30


class RoundRecovery:
    """Trains the model that a round of a pruning leaves, for every round of one request.

    Args:
        request (`RecoveryRequest`): the data and the arguments.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required unless the data are token ids.

    Attributes:
        recovery (`dict`, *optional*): how the model was trained in all rounds so far, as JSON values.
        trainer (`RecoveryTrainer`, *optional*): the trainer of the last round that was trained and not resumed.

    Raises:
        TypeError: where the request or its arguments have another type.
    """

    def __init__(self, request: RecoveryRequest, tokenizer: PreTrainedTokenizerBase | None):
        if not isinstance(request, RecoveryRequest):
            raise TypeError(
                f"recovery must be a RecoveryRequest; got a {type(request).__name__}. Write "
                f"RecoveryRequest(dataset, RecoveryArguments(output_dir=..., ...))."
            )
        self._args = checked_arguments(request.args)
        texts = TrainingTexts(request.dataset, tokenizer, request.eval_dataset)
        # Every round reads the data again.
        self._texts = texts.kept_for_reading_again()
        self._teacher, self._callbacks = request.teacher, checked_callbacks(request.callbacks)
        self._rounds = 1
        self._identity: dict[str, Any] = {}
        self.recovery: dict[str, Any] | None = None
        self.trainer: RecoveryTrainer | None = None

    def check(self, model: PreTrainedModel, record: Record, source: Source, rounds: int) -> None:
        """Raise the errors of all rounds that can be foreseen, before anything is measured.

        The data is read, and the teacher is located and compared with the model without its weights.

        Args:
            model (`PreTrainedModel`): the model that is pruned.
            record (`Record`): its record, which is empty where it is dense.
            source (`Source`): where it came from, and how it was opened.
            rounds (`int`): the number of rounds.
        """
        self._rounds = rounds
        check_arguments(self._args, source, rounds)
        check_can_be_trained(model)
        stages = self._args.stages()
        check_placement(model, stages, low_memory=False)
        if self._args.mode == BLOCK_DISTILL:
            check_block_stages(stages, self._texts.eval_dataset, self._callbacks)
        teacher: Any = self._teacher
        if teacher is None:
            origin = source.origin_of(model)
            if record.plan is not None:
                origin = Origin.of_plan(record.plan.metadata, source.folders) or origin
            teacher = origin if origin.name else None
        inputs = []
        for stage in stages:
            taught = stage.mode in TAUGHT or len(stages) == 1
            located = find_teacher(model, stage, teacher if taught else None, source.access)
            if located is not None and stage.mode == BLOCK_DISTILL:
                layers_compared(model.config.get_text_config(), located.config().get_text_config(), record.plan)
            data = check_stage(stage, model, self._texts, self._callbacks)
            inputs.append({"teacher": None if located is None else located.identity, "tokens": data})
        arguments = {name: value for name, value in self._args.to_dict().items() if not _is_immaterial(name)}
        self._identity = {
            "arguments": json.loads(json.dumps(arguments, default=str)),
            "data": self._texts.name,
            "stages": inputs,
        }

    def on_command_line(self) -> dict[str, list[str]] | None:
        """Return the sources of the data and the arguments as words of the command line; `None` where it cannot name
        the data, or the teacher or callbacks were passed in Python."""
        data = self._texts.on_command_line()
        if data is None or self._teacher is not None or self._args.teacher is not None or self._callbacks:
            return None
        return {"data": data, "arguments": self._args.on_command_line()}

    def run(
        self, model: PreTrainedModel, record: Record, source: Source, number: int, resume: Resume
    ) -> PreTrainedModel:
        """Return the trained model of a round, which is trained in place, or gets its weights from the state on disk.

        Args:
            model (`PreTrainedModel`): the model that the round has pruned.
            record (`Record`): its record.
            source (`Source`): where it came from.
            number (`int`): the number of the round, from 1.
            resume (`Resume`): the folder for states of this round.
        """
        before = self.recovery
        summary = self._resumed(model, resume)
        if summary is not None:
            self.recovery = _joined(before, summary)
            return model
        recovery = Recovery(model, replace(record, recovery=None), source)
        try:
            recovery.run(self._texts, self._arguments_of(number, resume), self._teacher, self._callbacks)
        finally:
            self.trainer = recovery.trainer or self.trainer
            if recovery.record.recovery is not None:
                summary = self._numbered(recovery.record.recovery, number)
                self.recovery = _joined(before, summary)
        for place, names in enumerate(_in_files(recovery.model)):
            resume.stage(f"recovered-{place}", **self._identity).save(partial(_weights_of, recovery.model, names))
        resume.stage("recovered", **self._identity).save(lambda: ({}, {"recovery": summary}))
        return recovery.model

    def _resumed(self, model: PreTrainedModel, resume: Resume) -> dict[str, Any] | None:
        """Give a model its trained weights, and return how it was trained; `None` where there is no such state."""
        state = resume.stage("recovered", **self._identity)
        summary = state.load(lambda _tensors, numbers: numbers["recovery"])
        if summary is None:
            return None
        for place, names in enumerate(_in_files(model)):
            weights = resume.stage(f"recovered-{place}", **self._identity).load(lambda tensors, _numbers: tensors)
            if weights is None:
                raise ValueError(
                    f"The state recovered-{place}.safetensors of a training that has ended is missing in the folder "
                    f"resume=... names. Delete the folder to start again."
                )
            for name in names:
                parameter = model.get_parameter(name)
                parameter.data = weights[name].to(parameter.device)
        return summary

    def _arguments_of(self, number: int, resume: Resume) -> RecoveryArguments:
        """Return the arguments of a round, with a folder of its own for checkpoints, and the one to resume from."""
        args = copy.copy(self._args)
        folder = resume.folder("recovery", **self._identity)
        if folder is not None:
            args.output_dir = str(folder)
            args.resume_from_checkpoint = state_to_resume(args)
        elif self._rounds > 1:
            args.output_dir = str(Path(str(args.output_dir)) / f"round-{number}")
        return args

    def _numbered(self, summary: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Return the record of the training of a round, with its number where there are several rounds."""
        if self._rounds == 1:
            return dict(summary)
        *earlier, last = ({"round": number, **stage} for stage in stages_of(summary))
        return {**last, "earlier": earlier} if earlier else last


def stages_of(recovery: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the records of all stages of a training, first to last."""
    yield from recovery.get("earlier", ())
    yield {name: value for name, value in recovery.items() if name != "earlier"}


def _joined(before: Mapping[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """Return the record of the training of all rounds so far."""
    *earlier, last = [*(stages_of(before) if before else []), *stages_of(now)]
    return {**last, "earlier": earlier} if earlier else last


def _is_immaterial(name: str) -> bool:
    return name in IMMATERIAL or name.startswith(IMMATERIAL_PREFIXES)


def _weights_of(model: PreTrainedModel, names: list[str]) -> State:
    return {name: model.get_parameter(name).detach() for name in names}, {}


def _in_files(model: PreTrainedModel) -> Iterator[list[str]]:
    """Yield the names of all parameters, with those together whose weights share a file."""
    names: list[str] = []
    size = 0
    for name, parameter in model.named_parameters():
        if names and size + parameter.nbytes > BYTES_PER_FILE:
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.nbytes
    yield names
