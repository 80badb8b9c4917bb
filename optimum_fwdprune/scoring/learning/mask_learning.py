"""The learning loop of policy-gradient pruning: steps, history, states to resume from, and several processes."""

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

# The run fails after this many steps in a row without a usable loss.
MAX_SKIPPED = 10

# With `stop_when_flat`, learning ends after this many stretches of steps in a row without a lower mean loss.
PATIENCE = 3

# The fields of a state that are numbers.
_NUMBERS = ("step", "baseline", "skipped", "rejected")


@dataclass
class Progress:
    """The state of a run. A run that resumes from it has the same result, bit for bit, as an uninterrupted one.

    Args:
        step (`int`): number of completed steps.
        rates (`Tensor[p]`, float64): keep rate of every variable of the policy.
        baseline (`float`): moving average of the loss; NaN before the first step.
        skipped (`int`): number of steps without a usable loss.
        rejected (`int`): number of masks whose loss was not finite.
        history (`dict[str, Tensor]`): `loss` in nats per token, `entropy` in bits and `expected_sparsity` as a
            fraction, `[steps]` each; `keep_rate` `[steps, sites]`.
    """

    step: int
    rates: torch.Tensor
    baseline: float = math.nan
    skipped: int = 0
    rejected: int = 0
    history: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def expected_loss(self) -> float:
        """Mean loss of the last tenth of the steps with a usable loss, in nats per token."""
        finite = self.history["loss"][self.history["loss"].isfinite()]
        return float(finite[-max(1, len(finite) // 10) :].mean())

    def state(self) -> State:
        """Return the state as tensors and numbers."""
        tensors = {"rates": self.rates}
        tensors |= {f"history.{name}": values[: self.step] for name, values in self.history.items()}
        return tensors, {name: getattr(self, name) for name in _NUMBERS}

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> Progress:
        """Return the state from the tensors and numbers that [`state`] returned."""
        rates = tensors.pop("rates")
        history = {name.removeprefix("history."): values for name, values in tensors.items()}
        return cls(rates=rates, history=history, **{name: numbers[name] for name in _NUMBERS})


def history_by_site(state: Progress, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Return the history with one entry per site for the keep rates: `keep_rate.<layer>.<kind>`, `[steps]`."""
    history = dict(state.history)
    for site, rates in zip(sites, history.pop("keep_rate").unbind(1)):
        history[f"keep_rate.{site.key}"] = rates
    return history


@dataclass(frozen=True)
class Schedule:
    """The options of learning: the fields of `PolicyGradientConfig` with the same names, and the model's size.

    Args:
        prunable_parameters (`int`): number of parameters of all sites of the model, including those that are not
            learned. Sparsities are fractions of it.
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

    With several processes, each evaluates a share of a step's masks and windows, and they exchange the losses. All of
    them end with the rates of a single process, up to the rounding of batches.

    Args:
        subject (`Subject`): a causal language model in eval mode, which is not changed, with the sites whose units are
            learned, in the order of the policy's masks.
        calibration (`Calibration`): the tokens.
        policy (`Policy`): the distribution of the masks.
        state (`Progress`): the initial state; it is changed and returned.
        schedule (`Schedule`): the options of learning.
        stage (`Stage`): where the state is stored for resuming.

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
                f"{MAX_SKIPPED} steps in a row had no finite loss, the last at step {step}. Load a float16 model that "
                f"overflows with masks in bfloat16 or float32."
            )
        state.step = step + 1
        learner.record(state, step, loss)
        sparsity = float(state.history["expected_sparsity"][step])
        bar.set_postfix(refresh=False, loss=f"{loss:.3f}", sparsity=f"{sparsity:.3f}")
        stage.save_now_and_then(state.state)
    stage.save(state.state)
    if state.step and state.skipped == state.step:
        raise ValueError(f"None of {state.step} steps had a finite loss, so that nothing was learned.")
    if state.rejected:
        logger.warning(
            "%d masks had no finite loss, so that %d of %d steps were skipped.",
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
        # The epoch of the last step, and its order of the windows, which many steps share.
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
        """Return the step's calibration windows. Every epoch uses all windows once, in its own order."""
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
        """Return the mean negative log-likelihood with every mask, `[N]` float64. Sequences have their own masks."""
        sums = torch.zeros(len(masks), dtype=torch.float64)
        counts = torch.zeros(len(masks), dtype=torch.float64)
        rows = ranks.own([(mask, window) for mask in range(len(masks)) for window in windows.tolist()])
        for start in range(0, len(rows), self._schedule.batch_size):
            batch = rows[start : start + self._schedule.batch_size]
            mask_indices, window_indices = (torch.tensor(part) for part in zip(*batch))
            gates = masks[mask_indices].float().split(self._sizes, dim=1)
            with gated(self._sites, {site.key: gate for site, gate in zip(self._sites, gates)}):
                nll, tokens = model_nll(self._model, *self._calibration.windows(window_indices))
            sums.index_add_(0, mask_indices, nll.cpu())
            counts.index_add_(0, mask_indices, tokens.double().cpu())
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
    """Return whether the mean loss has not improved over the last `PATIENCE` stretches of `window` steps."""
    if window is None or state.step % window or state.step < (PATIENCE + 1) * window:
        return False
    means = state.history["loss"][: state.step].double().view(-1, window).nanmean(1)
    return bool((means[-PATIENCE:] >= means[:-PATIENCE].min()).all())
