"""Gradients from forward passes: simultaneous perturbation, as MeZO does it (arXiv 2305.17333).

A draw shifts all perturbed tensors at once along its noise `z`, in both directions. The slope along `z` is
`c = [L(+εz) - L(-εz)] / 2ε`, and the mean of `c z` over many draws estimates the gradient. Only the slopes are stored,
since the noise is generated again from its seed, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...data.calibration import Calibration
from ...forward.losses import model_nll
from ...runs import ranks
from ...runs.loggers import get_logger
from ...runs.progress import progress
from ...runs.resume import Resume, State
from .perturbation import Perturbation


logger = get_logger(__name__)

# Largest share of the draws that may be rejected.
MAX_REJECTED = 0.25

# The rounding floor is measured by repeating the first draws with ε times this factor.
STRETCH = 1.1

# Rounding above this share of the slopes' size leads to a warning.
LOUD_ROUNDING = 0.5


@dataclass(frozen=True)
class Draws:
    """The losses and slopes of draws.

    Args:
        indices (`list[int]`): the accepted draws; their noise is generated from these numbers.
        slopes (`Tensor[accepted]`, float64): slopes `c`.
        losses (`Tensor[accepted, 2]`, float64): mean negative log-likelihood at +ε and -ε, in nats per token.
        rejected (`int`): number of draws with a loss that was not finite.
        epsilon (`float`): step size of the perturbation.
        rounding_floor (`float`): standard deviation of a slope due to rounding alone.
        converged (`bool`): whether the stopping rule ended the draws.
    """

    indices: list[int]
    slopes: torch.Tensor
    losses: torch.Tensor
    rejected: int
    epsilon: float
    rounding_floor: float
    converged: bool = False

    def part(self, start: int, stop: int) -> Draws:
        """Return only the accepted draws from `start` to before `stop`."""
        part = slice(start, stop)
        return replace(self, indices=self.indices[part], slopes=self.slopes[part], losses=self.losses[part])

    def gradient_sums(self, perturbation: Perturbation, index: int, groups: int = 1) -> torch.Tensor:
        """Return Σ c z for one perturbed tensor, over every `groups`-th draw: `[groups, *shape]`, float32.

        The sum over all groups, divided by the number of draws, is the gradient. `groups` copies of the tensor are in
        memory.
        """
        sums: torch.Tensor | None = None
        for position, (draw, slope) in enumerate(zip(self.indices, self.slopes.tolist())):
            z = perturbation.noise(draw, index)
            if sums is None:
                wide = torch.float64 if z.dtype == torch.float64 else torch.float32
                sums = torch.zeros((groups, *z.shape), dtype=wide, device=z.device)
            sums[position % groups].add_(z, alpha=slope)
        assert sums is not None
        return sums


@dataclass(frozen=True)
class Sampling:
    """How perturbations are drawn.

    Args:
        draws (`int`): number of perturbations.
        epsilon (`float`): step size along the noise.
        windows_per_draw (`int`): number of windows that a loss is the mean over.
        batch_size (`int`): sequences per forward pass, of both signs together.
    """

    draws: int
    epsilon: float
    windows_per_draw: int
    batch_size: int


@dataclass(frozen=True)
class Stopping:
    """A rule that may stop before all perturbations are drawn.

    Args:
        is_converged (`Callable`): called with all draws so far; no more are drawn once it returns `True`.
        check_every (`int`, defaults to 1): number of draws between two calls.
    """

    is_converged: Callable[[Draws], bool]
    check_every: int = 1


@torch.no_grad()
def draw_slopes(
    model: PreTrainedModel,
    perturbation: Perturbation,
    calibration: Calibration,
    sampling: Sampling,
    stopping: Stopping | None = None,
    resume: Resume | None = None,
) -> Draws:
    """Measure the loss on both sides of many perturbations.

    Draw `k` uses the `k`-th group of `windows_per_draw` calibration windows, and the first window follows the last.
    Both signs of as many draws as fit share one batched forward pass; their number changes rounding only. With several
    processes, each measures a share of the draws, and they exchange the losses.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode; it is not changed.
        perturbation (`Perturbation`): the tensors to shift, and their noise.
        calibration (`Calibration`): the tokens.
        sampling (`Sampling`): number and step size of the perturbations.
        stopping (`Stopping`, *optional*): a rule that may stop early.
        resume (`Resume`, *optional*): where the draws so far are stored.

    Raises:
        ValueError: where epsilon is too small for the model's dtype (the message names an epsilon that works), or
            where more than `MAX_REJECTED` of the draws have a loss that is not finite.
    """
    draws, epsilon = sampling.draws, sampling.epsilon
    sampler = _Sampler(model, perturbation, calibration, sampling)
    in_a_batch = max(1, sampling.batch_size // (2 * sampling.windows_per_draw))
    at_once = in_a_batch * ranks.world_size()
    accepted: list[int] = []
    losses: list[torch.Tensor] = []
    done, rejected, rounding_floor = 0, 0, math.nan
    stage = (resume or Resume()).stage("draws", calibration, noise=perturbation.generators)

    def state() -> State:
        numbers = {"indices": accepted, "done": done, "rejected": rejected, "rounding_floor": rounding_floor}
        return {"losses": torch.stack(losses) if losses else torch.zeros(0, 2, dtype=torch.float64)}, numbers

    def take_up(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> tuple[int, int, float]:
        losses.extend(tensors["losses"])
        accepted.extend(numbers["indices"])
        return numbers["done"], numbers["rejected"], numbers["rounding_floor"]

    def result(converged: bool = False) -> Draws:
        measured = torch.stack(losses)
        slopes = (measured[:, 0] - measured[:, 1]) / (2 * epsilon)
        return Draws(list(accepted), slopes, measured, rejected, epsilon, rounding_floor, converged)

    done, rejected, rounding_floor = stage.load(take_up) or (0, 0, math.nan)
    converged = False
    check_every = draws if stopping is None else stopping.check_every
    if stopping is not None and accepted:
        # The rule compares successive calls, so that the calls before the interruption are repeated.
        for checked in range(max(1, done // check_every - 1) * check_every, done + 1, check_every):
            shown = result().part(0, sum(draw < checked for draw in accepted))
            converged = bool(shown.indices) and stopping.is_converged(shown) and checked == done
    portions = [
        list(range(start, min(start + at_once, stretch + check_every, draws)))
        for stretch in range(0, draws, check_every)
        for start in range(stretch, min(stretch + check_every, draws), at_once)
    ]
    # The number of processes may differ from that before an interruption.
    total = len(portions)
    portions = [left for portion in portions if (left := [draw for draw in portion if draw >= done])]
    before = total - len(portions)
    bar = progress([] if converged else portions, "Drawing perturbations", total=total, unit="batch", initial=before)
    for portion in bar:
        measured, window_differences = sampler.losses(portion, epsilon)
        finite = measured.isfinite().all(1)
        rejected += int((~finite).sum())
        if rejected > MAX_REJECTED * draws:
            raise ValueError(
                f"{rejected} of {draws} draws had a loss that is not finite at epsilon={epsilon:g} in {model.dtype}. "
                f"Use a smaller epsilon, or load a float16 model that overflows in bfloat16 or float32."
            )
        if not accepted and finite.any():
            _check_responds(sampler, portion, measured[finite], epsilon)
            # It is measured on as many draws as a single process would use.
            rounding_floor = sampler.rounding_floor(portion[:in_a_batch], epsilon, window_differences[:in_a_batch])
        accepted += [draw for draw, good in zip(portion, finite.tolist()) if good]
        losses += list(measured[finite])
        done = portion[-1] + 1
        stage.save_now_and_then(state)
        if stopping is not None and accepted and done % check_every == 0 and stopping.is_converged(result()):
            converged = True
            break
    measured_draws = result(converged)
    _report(measured_draws, model.dtype)
    return measured_draws


class _Sampler:
    """Measures the losses of perturbed models."""

    def __init__(
        self, model: PreTrainedModel, perturbation: Perturbation, calibration: Calibration, sampling: Sampling
    ):
        self._model = model
        self._perturbation = perturbation
        self._calibration = calibration
        self._windows = sampling.windows_per_draw
        self._batch_size = sampling.batch_size

    def losses(self, draws: Sequence[int], epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean losses `[draws, 2]` at +ε and -ε, and their differences by window `[draws, windows]`."""
        nll = torch.zeros(len(draws), self._windows, 2, dtype=torch.float64)
        counts = torch.zeros(len(draws), self._windows, dtype=torch.float64)
        rows = [
            (place, window, side)
            for place in ranks.own(range(len(draws)))
            for window in range(self._windows)
            for side in range(2)
        ]
        available = len(self._calibration.input_ids)
        for start in range(0, len(rows), self._batch_size):
            # Sequences of a draw are neighbours and share their noise; within a draw, so are the windows of a sign.
            batch = sorted(rows[start : start + self._batch_size], key=lambda row: (row[0], row[2]))
            places, windows, sides = zip(*batch)
            numbers = torch.tensor([(draws[place] * self._windows + window) % available for place, window, _ in batch])
            with self._perturbation.applied(
                [draws[place] for place in places], [epsilon if side == 0 else -epsilon for side in sides]
            ):
                sums, tokens = self._nll(numbers)
            nll[places, windows, sides] = sums
            counts[places, windows] = tokens
        nll, counts = ranks.summed(nll), ranks.summed(counts)
        totals = counts.sum(1, keepdim=True)
        if not totals.all():
            raise ValueError("All windows of a draw are padding only. Remove such windows, or raise windows_per_draw.")
        return nll.sum(1) / totals, (nll[..., 0] - nll[..., 1]) / totals

    def rounding_floor(self, draws: Sequence[int], epsilon: float, differences: torch.Tensor) -> float:
        """Return the standard deviation of a slope due to rounding.

        The difference of a smooth loss is proportional to ε. The deviation from this is rounding and, at a large ε,
        the third derivative.
        """
        _, stretched = self.losses(draws, STRETCH * epsilon)
        left_over = (stretched - STRETCH * differences).square().sum(1) / (1 + STRETCH**2)
        return float(left_over[left_over.isfinite()].mean().sqrt()) / (2 * epsilon)

    def _nll(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sums, counts = model_nll(self._model, *self._calibration.windows(numbers))
        return sums.cpu(), counts.double().cpu()


def _check_responds(sampler: _Sampler, draws: list[int], losses: torch.Tensor, epsilon: float) -> None:
    """Raise `ValueError` where no draw changed the loss, and name an epsilon that does."""
    if (losses[:, 0] != losses[:, 1]).any():
        return
    works = epsilon * 10
    while works <= 1:
        _, differences = sampler.losses(draws, works)
        slope = float(differences.sum(1).square().mean().sqrt()) / (2 * works)
        if slope > 0 and sampler.rounding_floor(draws, works, differences) < LOUD_ROUNDING * slope:
            raise ValueError(
                f"epsilon={epsilon:g} is lost in rounding: the loss is {float(losses[0, 0]):.6g} on both sides. Use "
                f"epsilon={works:g}, which works for this model in its dtype."
            )
        works *= 10
    raise ValueError(
        f"The loss is {float(losses[0, 0]):.6g} on both sides of every perturbation up to epsilon=1. Either the model "
        f"does not depend on the perturbed weights, or its dtype is too coarse; load it in float32."
    )


def _report(draws: Draws, dtype: torch.dtype) -> None:
    if draws.rejected:
        logger.warning("%d draws were rejected because their loss was not finite.", draws.rejected)
    size = float(draws.slopes.square().mean().sqrt())
    if draws.rounding_floor > LOUD_ROUNDING * size:
        logger.warning(
            "Rounding in %s makes up about %.2g of slopes of size %.2g at epsilon=%g. Use a larger epsilon, or load "
            "the model in float32.",
            dtype,
            draws.rounding_floor,
            size,
            draws.epsilon,
        )
