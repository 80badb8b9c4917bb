"""The pruning of a model: it is checked, run, and recorded, also if it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .allocation.composing import EarlierPruning
from .allocation.job import resume_held, resume_of
from .allocation.plan import PruningPlan
from .architectures import find_sites, is_pruned
from .cutting.cut import Cut
from .data.amount import with_number
from .data.calibration import Calibration
from .data.load_calibration import load_calibration
from .export.gguf_tokenizer import checked_description
from .forward.evidence import Evidence
from .loading.offloading import check_readable
from .loading.origin import FINGERPRINT, NAME, REVISION
from .loading.source import Source
from .loading.state import check_not_consumed, evaluating, is_consumed
from .loading.subject import Sizes, Subject
from .planning.checks import check_kinds, check_model, check_request
from .planning.defaults import with_default_kinds
from .planning.dry_run import DryRun
from .planning.latency import LatencyTable
from .planning.make_plan import request_of_replay
from .planning.run import Run
from .record.outcome import outcome_of
from .record.record import Record
from .record.reproduction import IN_MEMORY, INPUTS, TRAINED, inputs_of
from .request.config import PruningConfig
from .runs.loggers import get_logger
from .runs.resume import Resume
from .scoring.score_units import check_scoring
from .scoring.scores import Scores


if TYPE_CHECKING:
    from .recovery.rounds import RoundRecovery

logger = get_logger(__name__)


class Pruning:
    """Scores or prunes a model, and keeps its record and source up to date.

    Args:
        model (`PreTrainedModel`): the model, which may have been pruned before.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required for calibration on text.
        dataset (*optional*): calibration data, which replaces that of the request.
        record (`Record`): record of the model.
        source (`Source`): where the model came from, and how it was opened.
        latencies (`LatencyTable`, *optional*): latencies of the model, if they were measured before.

    Attributes:
        model (`PreTrainedModel`): the model in its current state.
        record (`Record`): record of that model.
        source (`Source`): the source; after pruning, it includes folders where the model that was pruned may be.
        latencies (`LatencyTable`, *optional*): latencies, which can be reused by other requests for the same model.
        has_changed (`bool`): whether `model` is a pruned model by now, also if a later step failed.
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

    def with_defaults(self, config: PruningConfig) -> PruningConfig:
        """Return the request with the kinds of units that are the default for the model."""
        return with_default_kinds(config, self._subject(config).sites)

    def check(self, config: PruningConfig) -> None:
        """Raise the errors of a request that can be foreseen, so that they are not raised after other work."""
        subject = self._subject(config)
        check_request(subject, config)
        check_scoring(subject.model, config)
        with self._running(subject) as run:
            run.check(config)

    def score(self, config: PruningConfig, evidence: Evidence | None = None) -> Scores:
        """Score the units of the model; the model is not changed.

        Args:
            config (`PruningConfig`): the request.
            evidence (`Evidence`, *optional*): tokens and statistics that [`evidence`] returned.
        """
        subject = self._subject(config)
        config = with_default_kinds(config, subject.sites)
        check_kinds(subject, config)
        check_model(subject)
        with self._running(subject) as run, resume_held(config):
            scores = run.score(config, evidence)
        self.record = dataclasses.replace(self.record, scores=scores)
        return scores

    def evidence(self, requests: Sequence[PruningConfig], calibration: Calibration | None) -> Evidence:
        """Return the tokens with the statistics that the scores and reconstructions of several requests need, which
        are collected in one pass; the model is not changed.

        Args:
            requests (sequence of `PruningConfig`): requests with the same calibration and the same units.
            calibration (`Calibration`, *optional*): the tokens that [`calibration`] returned.
        """
        subject = self._subject(requests[0])
        check_model(subject)
        with self._running(subject) as run, resume_held(requests[0]):
            return run.evidence(requests, calibration)

    def calibration(self, config: PruningConfig, more: int = 0) -> Calibration:
        """Return the calibration tokens of a request, and `more` windows in addition."""
        with self._running(self._subject(config)) as run:
            return run.calibration(config, resume=resume_of(config, self.model), more=more)

    def prune(
        self,
        config: PruningConfig,
        plan: PruningPlan | None,
        scores: Scores | None,
        inplace: bool,
        chosen: Collection[str],
        recovery: RoundRecovery | None = None,
    ) -> None:
        """Prune the model.

        Args:
            config (`PruningConfig`): the request.
            plan (`PruningPlan`, *optional*): plan to replay; nothing is scored or allocated then.
            scores (`Scores`, *optional*): scores to use; nothing is scored then.
            inplace (`bool`): whether the model itself is pruned, and not a copy.
            chosen (collection of `str`): options of the request that the user set by name.
            recovery (`RoundRecovery`, *optional*): trains the model after every round.
        """
        config, subject = self._checked(config, plan, scores)
        if recovery is not None:
            recovery.check(self.model, self.record, self.source, config.rounds)
        if scores is not None:
            config = scores.options_into(config, chosen)
        asked = config if plan is None else request_of_replay(plan, config)
        before, inputs = Sizes.of(self.model, subject.sites), self._inputs(config, scores)
        if recovery is not None:
            inputs[TRAINED] = recovery.on_command_line()
        earlier = EarlierPruning.of(self.model, subject.sites, self.record.plan_of(self.model), self.record.recovery)
        origin = self.source.origin_of(self.model)

        def described(done: Cut) -> tuple[Record, Source]:
            """Return the record and the source of the pruned model."""
            metadata = {key: value for key, value in done.plan.metadata.items() if key not in (FINGERPRINT, REVISION)}
            metadata |= {**origin.to_metadata(), INPUTS: inputs}
            plan = _of_dense_model(dataclasses.replace(done.plan, metadata=metadata), earlier)
            trained = None if recovery is None else recovery.recovery
            source = dataclasses.replace(self.source, folders=origin.folders, saved_as=None)
            return Record(with_number(asked, run.windows), plan, self.record.scores, recovery=trained), source

        def keep(done: Cut) -> None:
            """Keep the pruned model with its plan as soon as it is complete."""
            self.record, self.source = described(done)
            self.model, self.has_changed = done.model, True
            origin.remember()

        def train(done: Cut, number: int, resume: Resume) -> Cut:
            """Train the model of a round; if that fails, its record tells how far it was trained."""
            assert recovery is not None
            try:
                return dataclasses.replace(done, model=recovery.run(done.model, *described(done), number, resume))
            finally:
                if inplace:
                    keep(done)

        # Where the model is not pruned in place, it stays the current one until all steps have succeeded.
        run = Run(subject, self._tokenizer, self._dataset, inplace, keep if inplace else _ignore, self.latencies)
        with self._noting_what_is_left(run), resume_held(config):
            trained = None if recovery is None else train
            done = run.prune(config, scores, trained) if plan is None else run.replay(plan, config)
            keep(done)
            if earlier is not None and earlier.followed_by(done.plan) is None:
                logger.warning("%s", earlier.why_apart(done.plan))
            outcome = outcome_of(before, done, run, config)
            self.record = dataclasses.replace(self.record, scores=run.scores, outcome=outcome)
            self.record.leave_with(self.model)

    def dry_run(self, config: PruningConfig, plan: PruningPlan | None) -> DryRun:
        """Return what a request would lead to, after the checks of [`prune`]; nothing is scored, and the model, which
        needs no weights, is not changed. The arguments are those of [`prune`]."""
        config, subject = self._checked(config, plan, None, needs_weights=False)
        with self._running(subject) as run:
            return run.dry_run(config, plan)

    def _checked(
        self, config: PruningConfig, plan: PruningPlan | None, scores: Scores | None, needs_weights: bool = True
    ) -> tuple[PruningConfig, Subject]:
        """Return a request with the defaults for the model, and the model, after the checks of both."""
        if plan is not None:
            config = dataclasses.replace(config, attention_unit=plan.attention_unit)
        subject = self._subject(config, needs_weights)
        if plan is None:
            config = with_default_kinds(config, subject.sites)
        check_request(subject, config, plan, scores)
        self._warn_of_tokenizer(config)
        return config, subject

    def _warn_of_tokenizer(self, config: PruningConfig) -> None:
        """Warn of a tokenizer that the GGUF file that will be made of the model cannot hold."""
        if config.for_gguf is not None and self._tokenizer is not None:
            try:
                checked_description(self._tokenizer)
            except ValueError as error:
                logger.warning("The export to GGUF will fail on the tokenizer as it is. %s", error)

    @contextmanager
    def _running(self, subject: Subject) -> Iterator[Run]:
        """Start a run that does not change the model, and keep the latencies that it measures."""
        run = Run(subject, self._tokenizer, self._dataset, latencies=self.latencies)
        try:
            yield run
        finally:
            self.latencies = run.latencies

    def _subject(self, config: PruningConfig, needs_weights: bool = True) -> Subject:
        """Return the model in its current state, with all its sites in the units of the request."""
        check_not_consumed(self.model)
        if needs_weights:
            check_readable(self.model)
        sites = find_sites(self.model, config.attention_unit)
        return Subject(self.model, sites, self.source.low_memory, self.source.work_folder)

    def _inputs(self, config: PruningConfig, scores: Scores | None) -> dict[str, Any]:
        """Return the inputs of a pruning besides the request as JSON values; warn of a dataset without an effect."""
        dataset = self._dataset
        in_memory = dataset is not None and not isinstance(dataset, (str, Path))
        was_pruned = self.record.plan is not None or is_pruned(self.model.config)
        if scores is not None and not scores.reads_anew(config):
            if dataset is not None:
                with evaluating(self.model):
                    scores.check_dataset(load_calibration(config, self.model, self._tokenizer, dataset))
            in_memory = scores.calibrated_on.get("source") in IN_MEMORY
        return inputs_of(self.source.arguments, self.model.dtype, was_pruned, in_memory)

    @contextmanager
    def _noting_what_is_left(self, run: Run) -> Iterator[None]:
        """Keep the latencies and scores of a run that fails for the next run, and add a note to its error on the state
        of `self.model` where that has changed."""
        try:
            yield
        except BaseException as error:
            self.record = dataclasses.replace(self.record, scores=run.scores or self.record.scores)
            note = ""
            if is_consumed(self.model):
                note = "Surgery was interrupted, and the model was consumed: load it again."
            elif self.has_changed:
                note = (
                    "pruner.model is the pruned model, and pruner.plan lists the units that it keeps. The checks and "
                    "measurements that failed are missing from its record."
                )
            if note:
                logger.error("%s", note)
                error.add_note(note)
            raise
        finally:
            self.latencies = run.latencies


def _of_dense_model(plan: PruningPlan, earlier: EarlierPruning | None) -> PruningPlan:
    """Return a plan of the dense model that combines `plan` with the earlier one; `plan` where that is impossible."""
    if earlier is None:
        return plan
    composed = earlier.followed_by(plan)
    if composed is None:
        return plan
    origin = {name: earlier.plan.metadata.get(name) for name in (NAME, FINGERPRINT, REVISION)}
    metadata = composed.metadata | {name: value for name, value in origin.items() if value is not None}
    return dataclasses.replace(composed, metadata=metadata)


def _ignore(_cut: Cut) -> None:
    """Do nothing when the pruned model is complete; it is used where the model is not pruned in place."""
