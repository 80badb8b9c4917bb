"""The long run behind policy-gradient pruning: steps, history, checkpoints, and several processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...architectures import Site
from ...data.calibration import Calibration
from ...forward.gates import gated
from ...forward.losses import model_nll
from ...loading.subject import Subject
from ...runs import ranks
from ...runs.loggers import get_logger
from ...runs.progress import progress
from ...runs.resume import Stage, State
from ..choices import Estimator
from .policies import Policy, entropy
from .policy_gradient import (
    cosine,
    policy_gradient,
    project,
)


logger = get_logger(__name__)

# Steps in a row without a usable loss that end the run.
MAX_SKIPPED = 10

# Stretches in a row without a lower mean loss that end a run which may stop when it is flat.
PATIENCE = 3


# Fields of a state that are numbers.
_NUMBERS = ("step", "baseline", "skipped", "rejected")


@dataclass
class Progress:
    """All that a run needs to go on: bit for bit as if it had never stopped.

    Args:
        step (`int`): steps done.
        rates (`Tensor[p]`, float64): keep rate of every variable of the policy.
        baseline (`float`): moving average of the loss; NaN before the first step.
        skipped (`int`): steps without a usable loss.
        rejected (`int`): masks whose loss was not finite.
        history (`dict[str, Tensor]`): `loss`, `entropy` and `expected_sparsity` `[steps]` in nats per token, bits and
            as a fraction; `keep_rate` `[steps, sites]`.
    """

    step: int
    rates: torch.Tensor
    baseline: float = math.nan
    skipped: int = 0
    rejected: int = 0
    history: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def expected_loss(self) -> float:
        """Mean loss of the last tenth of the steps that had one, in nats per token."""
        finite = self.history["loss"][self.history["loss"].isfinite()]
        return float(finite[-max(1, len(finite) // 10) :].mean())

    def state(self) -> State:
        """Return it as tensors and numbers."""
        tensors = {"rates": self.rates}
        tensors |= {f"history.{name}": values[: self.step] for name, values in self.history.items()}
        return tensors, {name: getattr(self, name) for name in _NUMBERS}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> Progress:
        """Return what [`state`] made these of."""
        rates = tensors.pop("rates")
        history = {name.removeprefix("history."): values for name, values in tensors.items()}
        return cls(rates=rates, history=history, **{name: numbers[name] for name in _NUMBERS})


def history_by_site(state: Progress, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Return the history with the keep rate of every site apart, `keep_rate.<layer>.<kind>`, `[steps]` each."""
    history = dict(state.history)
    for site, rates in zip(sites, history.pop("keep_rate").unbind(1)):
        history[f"keep_rate.{site.key}"] = rates
    return history


@dataclass(frozen=True)
class Schedule:
    """How to learn: fields of `PolicyGradientConfig` of the same names, and what sparsity is a fraction of.

    Args:
        prunable_parameters (`int`): of all sites of the model, learned or not.
    """

    steps: int
    learning_rate: float
    estimator: str
    masks_per_step: int
    antithetic: bool
    windows_per_step: int
    baseline_horizon: float
    stop_when_flat: int | None
    batch_size: int
    seed: int
    prunable_parameters: int


@torch.no_grad()
def learn_rates(
    subject: Subject,
    calibration: Calibration,
    policy: Policy,
    state: Progress,
    schedule: Schedule,
    stage: Stage,
) -> Progress:
    """Minimise the expected loss over the policy's masks, step by step, within its budgets.

    With several processes each evaluates its share of a step's masks and windows, and all know all losses, so every
    one of them ends with the rates that a single process would have, up to the rounding of its batches.

    Args:
        subject (`Subject`): a causal language model in eval mode, which is not changed, with the sites whose units are
            learned, in the order of the policy's masks.
        calibration (`Calibration`): the tokens.
        policy (`Policy`): what the masks are drawn from.
        state (`Progress`): where to start; it is changed and returned.
        schedule (`Schedule`): how.
        stage (`Stage`): where the state is kept.

    Raises:
        ValueError: where `MAX_SKIPPED` steps in a row have no usable loss.
    """
    learner = _Learner(subject, calibration, policy, schedule)
    _extend_history(state, schedule.steps, len(subject.sites))

    steps = range(state.step, schedule.steps)
    bar = progress(steps, "Learning masks", total=schedule.steps, unit="step", initial=state.step)
    skipped_in_a_row = 0
    for step in bar:
        if _is_flat(state, schedule.stop_when_flat):
            logger.info("The loss was flat, so learning stopped after %d steps.", state.step)
            break
        loss = learner.step(state, step)
        skipped_in_a_row = skipped_in_a_row + 1 if math.isnan(loss) else 0
        state.skipped += math.isnan(loss)
        if skipped_in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"{MAX_SKIPPED} steps in a row gave no finite loss, the last at step {step}. A float16 model that "
                f"overflows under masks runs in bfloat16 or float32."
            )
        state.step = step + 1
        learner.record(state, step, loss)
        sparsity = float(state.history["expected_sparsity"][step])
        bar.set_postfix(refresh=False, loss=f"{loss:.3f}", sparsity=f"{sparsity:.3f}")
        stage.save_now_and_then(state.state)
    stage.save(state.state)
    if state.step and state.skipped == state.step:
        raise ValueError(f"None of {state.step} steps gave a finite loss, so nothing was learned.")
    if state.rejected:
        logger.warning(
            "%d masks had no finite loss and %d of %d steps were skipped for it.",
            state.rejected,
            state.skipped,
            state.step,
        )
    state.history = {name: values[: state.step] for name, values in state.history.items()}
    return state


class _Learner:
    def __init__(self, subject: Subject, calibration: Calibration, policy: Policy, schedule: Schedule):
        self._model = subject.model
        self._sites = subject.sites
        self._sizes = [site.num_units for site in self._sites]
        self._parameters = torch.tensor([site.num_parameters for site in self._sites], dtype=torch.float64)
        self._calibration = calibration
        self._policy = policy
        self._schedule = schedule
        # The last epoch's order of the windows, which many steps share.
        self._order = (-1, torch.empty(0, dtype=torch.int64))

    def step(self, state: Progress, step: int) -> float:
        """Take one step and return the mean loss, or NaN where no gradient could be formed."""
        schedule = self._schedule
        draws = self._policy.draw(state.rates, schedule.masks_per_step, (schedule.seed, step), schedule.antithetic)
        losses = self._losses(draws.masks, self._windows(step))
        usable = losses.isfinite()
        if schedule.antithetic:
            usable = usable.view(-1, 2).all(1).repeat_interleave(2)
        fewest = 4 if schedule.antithetic and schedule.estimator == Estimator.LEAVE_ONE_OUT else 2
        state.rejected += int((~usable).sum())
        if int(usable.sum()) < fewest:
            return math.nan
        deviations, losses = draws.deviations[usable], losses[usable]
        mean = float(losses.mean())
        state.baseline = _averaged(state.baseline, mean, schedule.baseline_horizon)
        gradient = policy_gradient(deviations, losses, schedule.estimator, state.baseline, schedule.antithetic)
        moved = state.rates - schedule.learning_rate * cosine(step, schedule.steps) * gradient
        for budget in self._policy.budgets:
            moved[budget.members] = project(moved[budget.members], budget)
        state.rates = moved
        return mean

    def record(self, state: Progress, step: int, loss: float) -> None:
        state.history["loss"][step] = loss
        state.history["entropy"][step] = entropy(self._policy.keep_probabilities(state.rates))
        site_rates = self._policy.site_rates(state.rates)
        removed = self._parameters @ (1 - site_rates)
        state.history["expected_sparsity"][step] = removed / self._schedule.prunable_parameters
        state.history["keep_rate"][step] = site_rates

    def _windows(self, step: int) -> torch.Tensor:
        """The step's calibration windows: every epoch takes each once, in an order of its own."""
        available, wanted = len(self._calibration.input_ids), self._schedule.windows_per_step
        positions = range(step * wanted, (step + 1) * wanted)
        orders = {epoch: self._epoch(epoch, available) for epoch in {place // available for place in positions}}
        return torch.stack([orders[place // available][place % available] for place in positions])

    def _epoch(self, epoch: int, available: int) -> torch.Tensor:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._schedule.seed + epoch)
            self._order = (epoch, torch.randperm(available, generator=generator))
        return self._order[1]

    def _losses(self, masks: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood under each mask, `[N]` float64, every sequence under its own mask."""
        sums = torch.zeros(len(masks), dtype=torch.float64)
        counts = torch.zeros(len(masks), dtype=torch.float64)
        rows = ranks.own([(mask, window) for mask in range(len(masks)) for window in windows.tolist()])
        for start in range(0, len(rows), self._schedule.batch_size):
            of_masks, numbers = (torch.tensor(part) for part in zip(*rows[start : start + self._schedule.batch_size]))
            gates = masks[of_masks].float().split(self._sizes, dim=1)
            with gated(self._sites, {site.key: gate for site, gate in zip(self._sites, gates)}):
                nll, tokens = model_nll(self._model, *self._calibration.windows(numbers))
            sums.index_add_(0, of_masks, nll.cpu())
            counts.index_add_(0, of_masks, tokens.double().cpu())
        return ranks.summed(sums) / ranks.summed(counts)


def _averaged(average: float, value: float, horizon: float) -> float:
    return value if math.isnan(average) else (1 - 1 / horizon) * average + value / horizon


def _extend_history(state: Progress, steps: int, sites: int) -> None:
    for name, shape in (("loss", ()), ("entropy", ()), ("expected_sparsity", ()), ("keep_rate", (sites,))):
        values = torch.full((steps, *shape), math.nan, dtype=torch.float32)
        done = state.history.get(name, values[:0])[:steps]
        values[: len(done)] = done
        state.history[name] = values


def _is_flat(state: Progress, window: int | None) -> bool:
    """Whether the last `PATIENCE` stretches of `window` steps all had a mean loss no lower than the best before."""
    if window is None or state.step % window or state.step < (PATIENCE + 1) * window:
        return False
    means = state.history["loss"][: state.step].double().view(-1, window).nanmean(1)
    return bool((means[-PATIENCE:] >= means[:-PATIENCE].min()).all())
