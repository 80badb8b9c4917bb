"""One pruning of a model: checked, run, and recorded however it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .allocation.composing import EarlierPruning
from .allocation.job import resume_held
from .allocation.plan import PruningPlan
from .architectures import find_sites, is_pruned
from .architectures.sizes import ModelSizes
from .cutting.cut import Cut
from .data.load_calibration import load_calibration
from .loading.offloading import check_readable
from .loading.origin import FINGERPRINT, NAME, REVISION
from .loading.source import Source
from .loading.state import check_not_consumed, evaluating, is_consumed
from .loading.subject import Sizes, Subject
from .planning.checks import check_model, check_request
from .planning.latency import LatencyTable
from .planning.make_plan import request_of_replay
from .planning.run import Run
from .record.outcome import Outcome, Speedup
from .record.record import Record
from .record.reproduction import IN_MEMORY, INPUTS, inputs_of
from .request.config import PruningConfig
from .runs.loggers import get_logger
from .scoring.scores import Scores


logger = get_logger(__name__)


class Pruning:
    """Scores or prunes a model, and keeps what is known of it up to date.

    Args:
        model (`PreTrainedModel`): the model, dense or pruned before.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for calibration on text.
        dataset (*optional*): calibration data instead of that of the request.
        record (`Record`): what is known of the model.
        source (`Source`): where it came from, and how it was opened.
        latencies (`LatencyTable`, *optional*): of the model, where they were measured before.

    Attributes:
        model (`PreTrainedModel`): the model as it is now.
        record (`Record`): of that model.
        source (`Source`): which names where the model that was pruned may be.
        latencies (`LatencyTable`, *optional*): which serve another request for the same model.
        has_changed (`bool`): whether the model is a pruned one by now, also where a later step failed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        dataset: Any,
        record: Record,
        source: Source,
        latencies: LatencyTable | None,
    ):
        self.model, self.record, self.source, self.latencies = model, record, source, latencies
        self.has_changed = False
        self._tokenizer, self._dataset = tokenizer, dataset

    def score(self, config: PruningConfig) -> Scores:
        """Score the units of the model, which is not changed."""
        subject = self._subject(config)
        check_model(subject)
        run = Run(subject, self._tokenizer, self._dataset, latencies=self.latencies)
        try:
            with resume_held(config):
                scores = run.score(config)
        finally:
            self.latencies = run.latencies
        self.record = dataclasses.replace(self.record, scores=scores)
        return scores

    def prune(
        self,
        config: PruningConfig,
        plan: PruningPlan | None,
        scores: Scores | None,
        inplace: bool,
        chosen: Collection[str],
    ) -> None:
        """Prune the model.

        Args:
            config (`PruningConfig`): the request.
            plan (`PruningPlan`, *optional*): replay it instead of scoring and allocating.
            scores (`Scores`, *optional*): allocate by these instead of scoring.
            inplace (`bool`): consume the model.
            chosen (collection of `str`): options of the request that the caller set by name.
        """
        if plan is not None:
            config = dataclasses.replace(config, attention_unit=plan.attention_unit)
        subject = self._subject(config)
        check_request(subject, config, plan, scores)
        if scores is not None:
            config = scores.options_into(config, chosen)
        asked = config if plan is None else request_of_replay(plan, config)
        before, inputs = Sizes.of(self.model, subject.sites), self._inputs(config, scores)
        earlier = EarlierPruning.of(self.model, subject.sites, self.record.plan_of(self.model), self.record.recovery)
        origin = self.source.origin_of(self.model)

        def keep(done: Cut) -> None:
            """Take up the pruned model as soon as it is whole."""
            metadata = {key: value for key, value in done.plan.metadata.items() if key not in (FINGERPRINT, REVISION)}
            metadata |= {**origin.to_metadata(), INPUTS: inputs}
            plan = _of_dense_model(dataclasses.replace(done.plan, metadata=metadata), earlier)
            self.model, self.record, self.has_changed = done.model, Record(asked, plan, self.record.scores), True
            origin.remember()
            self.source = dataclasses.replace(self.source, folders=origin.folders, saved_as=None)

        # A dense model that is not consumed stays, whatever happens to the pruned one.
        run = Run(subject, self._tokenizer, self._dataset, inplace, keep if inplace else _ignore, self.latencies)
        with self._noting_what_is_left(run), resume_held(config):
            done = run.prune(config, scores) if plan is None else run.replay(plan, config)
            keep(done)
            if earlier is not None and earlier.followed_by(done.plan) is None:
                logger.warning("%s", earlier.why_apart(done.plan))
            outcome = _outcome(before, done, run, config)
            self.record = dataclasses.replace(self.record, scores=run.scores, outcome=outcome)
            self.record.leave_with(self.model)

    def _subject(self, config: PruningConfig) -> Subject:
        """The model as it is, with all its sites in the units of the request."""
        check_not_consumed(self.model)
        check_readable(self.model)
        sites = find_sites(self.model, config.attention_unit)
        return Subject(self.model, sites, self.source.low_memory, self.source.work_folder)

    def _inputs(self, config: PruningConfig, scores: Scores | None) -> dict[str, Any]:
        """What goes into a pruning beside the request, as JSON values; warns of data that scores make useless."""
        dataset = self._dataset
        in_memory = dataset is not None and not isinstance(dataset, (str, Path))
        if scores is not None and not scores.reads_anew(config):
            if dataset is not None:
                with evaluating(self.model):
                    scores.check_dataset(load_calibration(config, self.model, self._tokenizer, dataset))
            in_memory = scores.calibrated_on.get("source") in IN_MEMORY
        return inputs_of(self.source.arguments, self.model.dtype, is_pruned(self.model.config), in_memory)

    @contextmanager
    def _noting_what_is_left(self, run: Run) -> Iterator[None]:
        """Keep the latencies and scores of a run that fails, which can serve another, and add to the error what
        `self.model` is where it is no longer what it was."""
        try:
            yield
        except BaseException as error:
            self.record = dataclasses.replace(self.record, scores=run.scores or self.record.scores)
            note = ""
            if is_consumed(self.model):
                note = "Surgery was interrupted, and the model was consumed: load it again."
            elif self.has_changed:
                note = (
                    "pruner.model is the pruned model as far as it was finished, and pruner.plan what it kept; the "
                    "checks and measurements that failed were not made on it."
                )
            if note:
                logger.error("%s", note)
                error.add_note(note)
            raise
        finally:
            self.latencies = run.latencies


def _of_dense_model(plan: PruningPlan, earlier: EarlierPruning | None) -> PruningPlan:
    """Return the plan that does to the dense model what `plan` and the one before it did, where there is one."""
    if earlier is None:
        return plan
    composed = earlier.followed_by(plan)
    if composed is None:
        return plan
    origin = {name: earlier.plan.metadata.get(name) for name in (NAME, FINGERPRINT, REVISION)}
    metadata = composed.metadata | {name: value for name, value in origin.items() if value is not None}
    return dataclasses.replace(composed, metadata=metadata)


def _outcome(before: Sizes, done: Cut, run: Run, config: PruningConfig) -> Outcome:
    """The figures of a pruning that is done, `before` being the sizes of the model that it consumed."""
    after, speedup = ModelSizes.of(done.model), None
    if config.target_speedup is not None and run.speedup is not None:
        speedup = Speedup(config.target_speedup, *run.speedup)
    return Outcome(
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        prunable_parameters=before.prunable,
        removed_parameters=sum(len(done.plan.removed(key)) * size for key, size in before.per_unit.items()),
        requested_sparsity=done.plan.metadata.get("requested_sparsity"),
        masked_difference=done.difference,
        seconds=run.clock.seconds,
        calibration=run.calibrated_on,
        speedup=speedup,
        unit_parameters=before.per_unit,
    )


def _ignore(_cut: Cut) -> None:
    """For a dense model that is not consumed."""
