"""The stages of a run, in order: settle the request, score, plan and cut, round after round; or replay a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..allocation.fitting import check_fits
from ..allocation.job import Job, resume_of
from ..allocation.losses import losses_by_kind
from ..allocation.plan import PruningPlan
from ..allocation.rounds import Rounds
from ..architectures import SiteKey, find_sites
from ..cutting.cut import Cut, cut
from ..cutting.in_memory import InMemory
from ..cutting.on_disk import OnDisk
from ..data.amount import Amount, with_number
from ..data.calibration import Calibration
from ..data.held_out import windows_and_held_out
from ..forward.evidence import Evidence
from ..loading.state import evaluating
from ..loading.subject import Subject
from ..request.choices import ReconstructionKind
from ..request.config import PruningConfig
from ..request.speed import shares_of_phases
from ..runs.clock import StageClock
from ..runs.progress import announce, progress
from ..runs.resume import Resume
from ..scoring.score_units import check_scoring, gather_evidence, needs_calibration, score_units
from ..scoring.scores import Scores
from .calibration_text import CalibrationText
from .dry_run import DryRun, foreseen
from .duration import announce_time
from .forecast import warn_of_overshoot
from .gguf_layout import check_gguf_plan
from .latency import LatencyCost, LatencyTable
from .make_plan import keeper, make_plan, replayed
from .quality import QualityChoice, largest_sparsity
from .serving import with_memory
from .settler import Settler
from .sharing import shared_dense_stream
from .stock_layout import STOCK, check_stock_layout
from .timing import measured_speedup, seconds_of_phases


class Run:
    """One request carried out on one model.

    Args:
        subject (`Subject`): the model with all its sites; it must have passed the checks in `planning/checks.py`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required for calibration on text.
        dataset (*optional*): calibration data, which replaces that of the request; see
            [`~optimum_fwdprune.data.load_calibration.load_calibration`].
        inplace (`bool`, defaults to `True`): whether the model itself is pruned, and not a copy.
        finished (`Callable`, *optional*): called with a pruned model as soon as it is complete, before it is checked,
            and after every round.
        latencies (`LatencyTable`, *optional*): latencies of the model, if they were measured before.

    Attributes:
        scores (`Scores`, *optional*): the last scores; if a later stage fails, another request can use them.
        speedup (`tuple[float, float | None]`, *optional*): the predicted and the measured speed-up, if one was
            requested; the measured one is `None` where another program measured the latencies.
        clock (`StageClock`): the seconds of every stage.
        calibrated_on (`str`, *optional*): source of the calibration tokens.
        windows (`int`, *optional*): number of the calibration windows.
    """

    def __init__(
        self,
        subject: Subject,
        tokenizer: PreTrainedTokenizerBase | None,
        dataset: Any = None,
        inplace: bool = True,
        finished: Callable[[Cut], None] = lambda _cut: None,
        latencies: LatencyTable | None = None,
    ):
        self._subject, self._text = subject, CalibrationText(tokenizer, dataset)
        self._inplace, self._finished = inplace, finished
        self._settler = Settler(subject, latencies)
        self.scores: Scores | None = None
        self.speedup: tuple[float, float | None] | None = None
        self.clock = StageClock()
        self.calibrated_on: str | None = None
        self.windows: int | None = None

    @property
    def latencies(self) -> LatencyTable | None:
        """Latencies of the model, if they were measured."""
        return self._settler.latencies

    def check(self, config: PruningConfig) -> None:
        """Raise an error where the constraints of a request do not allow its budget with scores of its units."""
        self._settler.check(config)

    def score(self, config: PruningConfig, evidence: Evidence | None = None) -> Scores:
        """Score the units of the model; the model is not changed.

        Args:
            config (`PruningConfig`): the request.
            evidence (`Evidence`, *optional*): tokens and statistics that were gathered before.
        """
        config, budget = self._settler.announced(config) if evidence is None else self._settler.settled(config)
        with evaluating(self._subject.model):
            rounds = Rounds(self._subject.sites, config, budget)
            return self._scored(self._subject, rounds, self._job(self._subject, rounds, 1), evidence)

    def evidence(self, requests: Sequence[PruningConfig], calibration: Calibration | None) -> Evidence:
        """Return the tokens with the statistics that the scores and reconstructions of several requests need.

        Args:
            requests (sequence of `PruningConfig`): requests with the same calibration and the same folder of states.
            calibration (`Calibration`, *optional*): the tokens; by default none.
        """
        with evaluating(self._subject.model):
            resume = resume_of(requests[0], self._subject.model)
            # Settled requests may remove units of more kinds and layers.
            settled = [self._settler.settled(request)[0] for request in requests]
            return gather_evidence(self._subject, settled, calibration, resume)

    def replay(self, plan: PruningPlan, config: PruningConfig) -> Cut:
        """Cut the model by a plan, with the reconstruction of the request."""
        subject = self._subject
        check_fits(plan, subject)
        if config.layout == STOCK:
            check_stock_layout(subject, plan, config.reconstruction)
        plan = replayed(plan, config)
        announce("\n".join(losses_by_kind(plan.kept, plan.num_units, plan.attention_unit).values()))
        evidence = Evidence()
        if config.reconstruction != ReconstructionKind.NONE:
            calibration = self.calibration(config)
            evidence, self.calibrated_on = Evidence(calibration), calibration.source
            self.windows = len(calibration)
        job = Job(config, None, resume_of(config, subject.model), self.clock)
        return self._cut(subject, plan, evidence, job)

    def prune(
        self,
        config: PruningConfig,
        scores: Scores | None = None,
        train: Callable[[Cut, int, Resume], Cut] | None = None,
    ) -> Cut:
        """Score, plan and cut in `config.rounds` rounds.

        Args:
            config (`PruningConfig`): the request.
            scores (`Scores`, *optional*): scores for the first round, which is not scored then.
            train (`Callable`, *optional*): trains the model after every round. It is called with the result of all
                rounds so far, the number of the round, and the folder for states of this round.

        Returns:
            `Cut`: the model after the last round, with a plan that combines all rounds.
        """
        if config.limits_of_quality:
            with self.clock.stage("choose the size"):
                config, scores = self._within_limit(config)
        with self.clock.stage("measure latencies"):
            config, budget = self._settler.announced(config, may_remove_layers=scores is None)
            if scores is not None:
                # A large budget may take units of kinds that were not scored.
                scores.check_matches(self._subject.sites, config, self._subject.architecture.model_type)
            dense_seconds = seconds_of_phases(self._subject.model, config, self.latencies)
        rounds = Rounds(self._subject.sites, config, budget)
        done: Cut | None = None
        numbers = range(1, config.rounds + 1)
        for number in progress(numbers, "Pruning in rounds", unit="round") if config.rounds > 1 else numbers:
            subject = self._subject if done is None else self._left_by(done, config)
            done = self._round(subject, rounds, number, done, scores if number == 1 else None)
            if train is not None:
                with self.clock.stage("recover"):
                    done = train(done, number, resume_of(rounds.with_states(number), done.model))
        assert done is not None and self.scores is not None
        if config.target_memory is not None:
            done = dataclasses.replace(done, plan=with_memory(done, config))
        self.calibrated_on = self.scores.calibrated_on.get("source")
        if config.target_speedup is not None and isinstance(budget.cost, LatencyCost):
            measured = None
            if dense_seconds:
                with self.clock.stage("measure latencies"):
                    seconds = seconds_of_phases(done.model, config, self.latencies)
                measured = measured_speedup(dense_seconds, seconds, shares_of_phases(config.speed_of))
            removed = rounds.removed({key: len(units) for key, units in done.plan.kept.items()})
            self.speedup = budget.cost.speedup(removed), measured
        return done

    def calibration(
        self,
        config: PruningConfig,
        model: PreTrainedModel | None = None,
        resume: Resume | None = None,
        more: int = 0,
    ) -> Calibration:
        """Return the calibration tokens of a request, which `model`, by default the run's, generates if requested, and
        `more` windows than it asks for; their number is announced."""
        return self._text.load(config, self._subject.model if model is None else model, resume, more)

    def dry_run(self, config: PruningConfig, plan: PruningPlan | None = None) -> DryRun:
        """Return what a request, or the replay of a plan, would lead to. The model needs no weights; calibration data
        is read as for a run, except for text that the model would generate."""
        calibration = None
        is_needed = config.reconstruction != ReconstructionKind.NONE if plan is not None else needs_calibration(config)
        if is_needed:
            calibration = self._text.read(config, self._subject.model)
            config = with_number(config, len(calibration))
        return foreseen(self._subject, self._settler, config, plan, calibration)

    def _within_limit(self, config: PruningConfig) -> tuple[PruningConfig, Scores]:
        """Return the request with the largest sparsity within its limit of quality instead, and the scores."""
        subject, (limit,) = self._subject, config.limits_of_quality
        resume = resume_of(config, subject.model)

        def of(sparsity: float) -> PruningConfig:
            changes: dict[str, Any] = {limit: None, "sparsity": sparsity}
            return dataclasses.replace(config, **changes)

        wanted = Amount.of(config, subject.model).windows
        calibration, held_out = windows_and_held_out(wanted, lambda more: self.calibration(config, None, resume, more))
        # The model that is made is calibrated on the same windows.
        self._text.dataset = calibration
        largest = largest_sparsity(lambda sparsity: self._settler.settled(of(sparsity), may_remove_layers=False))
        with evaluating(subject.model):
            settled, _ = self._settler.settled(of(largest), may_remove_layers=False)
            evidence = gather_evidence(subject, [settled], calibration, resume)
            stream = shared_dense_stream(subject.model, [config], calibration, resume)
            scores = self.score(of(largest), dataclasses.replace(evidence, dense_stream=stream))

            def kept_of(sparsity: float) -> dict[SiteKey, list[int]]:
                settled, budget = self._settler.settled(of(sparsity), may_remove_layers=False)
                rounds = Rounds(subject.sites, settled, budget)
                return keeper(rounds, subject.sites, Job(settled, budget))(scores.values)

            stage = resume.stage("quality", calibration)
            choice = QualityChoice(subject, config, scores.evidence, held_out, stage)
            sparsity = choice.run(kept_of, largest)
        details = scores.details | {"quality": choice.details(sparsity)}
        return of(sparsity), dataclasses.replace(scores, details=details)

    def _job(self, subject: Subject, rounds: Rounds, number: int) -> Job:
        config, budget = rounds.request(subject.sites, number)
        return Job(config, budget, resume_of(config, subject.model), self.clock)

    def _round(self, subject: Subject, rounds: Rounds, number: int, done: Cut | None, scores: Scores | None) -> Cut:
        """Score, plan and cut the model of the previous round; return the result of all rounds so far."""
        job = self._job(subject, rounds, number)
        with evaluating(subject.model):
            with self.clock.stage("score"):
                self.scores = scores = self._scored(subject, rounds, job) if scores is None else scores
                if scores.calibration is None and scores.runs_tokens(job.config):
                    scores = scores.calibrated_with(self.calibration(job.config, subject.model, job.resume))
            with self.clock.stage("allocate"):
                plan, scores = make_plan(subject, scores, rounds, job)
        if job.config.layout == STOCK:
            check_stock_layout(subject, plan, job.config.reconstruction)
        if job.config.for_gguf is not None:
            check_gguf_plan(subject, plan, job.config.reconstruction)
        if number == job.config.rounds:
            whole_plan = plan if done is None else done.plan.followed_by(plan)
            warn_of_overshoot(rounds.config, rounds.overshoot(whole_plan))
        if scores.calibration is not None:
            self.windows = len(scores.calibration)
        # Later rounds use the same tokens, which the dense model may have generated.
        self._text.dataset = scores.calibration or self._text.dataset
        now = self._cut(subject, plan, scores.evidence, job, done)
        # Gram matrices are large, and are not needed once the weights are cut.
        self.scores = dataclasses.replace(scores, grams={})
        now = now if done is None else now.after(done)
        rounds.follow(now.plan)
        self._finished(now)
        return now

    def _left_by(self, done: Cut, config: PruningConfig) -> Subject:
        before = {now: done.plan.num_units[key] for key, now in done.plan.keys_after().items()}
        sites = find_sites(done.model, config.attention_unit)
        sites = [dataclasses.replace(site, units_before=before[site.key]) for site in sites]
        return dataclasses.replace(self._subject, model=done.model, sites=sites)

    def _scored(self, subject: Subject, rounds: Rounds, job: Job, evidence: Evidence | None = None) -> Scores:
        check_scoring(subject.model, job.config)
        if evidence is None:
            calibration = None
            if needs_calibration(job.config):
                calibration = self.calibration(job.config, subject.model, job.resume)
                if self.scores is None:
                    announce_time(subject, job, calibration)
            evidence = gather_evidence(subject, [job.config], calibration, job.resume)
        return score_units(subject, job, evidence, keeper(rounds, subject.sites, job))

    def _cut(self, subject: Subject, plan: PruningPlan, evidence: Evidence, job: Job, done: Cut | None = None) -> Cut:
        """Cut a model on disk or in memory; models of earlier rounds are always cut in place."""
        if subject.streamed:
            return cut(subject, plan, evidence, job, OnDisk(subject, plan, job, evidence.calibration))

        def finished(now: Cut) -> None:
            self._finished(now if done is None else now.after(done))

        inplace = self._inplace or done is not None
        return cut(subject, plan, evidence, job, InMemory(subject, plan, job, evidence.calibration, inplace, finished))
