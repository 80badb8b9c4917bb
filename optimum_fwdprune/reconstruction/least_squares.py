"""The regression of reconstruction: an output as a linear function of kept input features, with a ridge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..forward.gates import Projection
from ..forward.products import add_cross_products, add_products, mirror
from ..runs import ranks
from ..runs.devices import (
    back_to,
    precise,
    precise_device,
    precise_sum,
)


# Shares of the mean diagonal of the Gram matrix that may be added to its diagonal; held-out windows determine which.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)

# Further shares that are added one after the other while rounding leaves a Gram matrix indefinite.
LAST_RIDGES = (1e-6, 1e-4, 1e-2)

# Ridges are compared on this many random mixtures of the outputs if there are several times as many outputs. Solving
# for all outputs takes most of the time, and the best ridge depends on the features.
MIXTURES = 64

# The ridge if no window can be held out.
DEFAULT_RIDGE = 1e-2


@dataclass
class NormalEquations:
    """Sums over tokens of the kept features x and of the residual r, which is the target minus W x.

    Args:
        gram (`Tensor[kept, kept]`): Σ x xᵀ.
        cross (`Tensor[out_features, kept]`): Σ r xᵀ.
        energy (`Tensor[]`, float64): Σ ‖r‖².
        count (`int`): number of tokens.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor
    count: int

    @classmethod
    def empty(cls, kept: int, out_features: int, device: torch.device) -> NormalEquations:
        """Return the sums over no tokens, in float32."""
        zeros = torch.zeros(kept + out_features, kept, dtype=torch.float32, device=device)
        energy = torch.zeros((), dtype=torch.float64, device=precise_device(device))
        return cls(zeros[:kept], zeros[kept:], energy, 0)

    @classmethod
    def of_removed(cls, gram: torch.Tensor, count: int, weight: torch.Tensor, kept: torch.Tensor) -> NormalEquations:
        """Return the sums for the residual `W_r x_r`, the output of the removed features.

        Args:
            gram (`Tensor[in_features, in_features]`): Σ x xᵀ over all features.
            count (`int`): number of tokens.
            weight (`Tensor[out_features, in_features]`): W.
            kept (`Tensor[in_features]`, bool): whether a feature is kept.
        """
        lost = weight[:, ~kept].float()
        rows = gram[~kept]
        energy = precise_sum(lost @ rows[:, ~kept] * lost)
        return cls(gram[kept][:, kept], lost @ rows[:, kept], energy, count)

    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None:
        """Add tokens: `inputs`, `[tokens, kept]`, and `residual`, `[tokens, out_features]`, in any float dtype.

        The sums are complete in the result of [`pooled`].
        """
        # Residuals of bfloat16 models are differences of values that were rounded more coarsely than they are here.
        in_bfloat16 = inputs.dtype == torch.bfloat16
        inputs, residual = inputs.float(), residual.float()
        add_products(self.gram, inputs, in_bfloat16)
        add_cross_products(self.cross, residual, inputs, in_bfloat16)
        self.energy += precise_sum(residual.square())
        self.count += len(inputs)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.count + other.count
        )

    def pooled(self) -> NormalEquations:
        """Return the sums over the tokens of all processes of a run, in the memory of these sums."""
        mirror(self.gram)
        if ranks.world_size() == 1:
            return self
        count = self.energy.new_tensor(self.count)
        energy, count = ranks.summed(torch.stack([self.energy, count]))
        return NormalEquations(ranks.summed(self.gram), ranks.summed(self.cross), energy, int(count))

    def mixed(self) -> NormalEquations:
        """Return the sums to compare ridges on, with random mixtures of the outputs if there are many. `energy` is
        that of all outputs."""
        outputs = len(self.cross)
        if outputs < 4 * MIXTURES:
            return self
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (MIXTURES, outputs), generator=generator).to(self.cross) * 2 - 1
        return NormalEquations(self.gram, signs @ self.cross, self.energy, self.count)

    def change(self, ridge: float) -> torch.Tensor:
        """Return the change of W, `Σ r xᵀ (Σ x xᵀ + λ I)⁻¹`, float64, with λ = `ridge` · mean(diag Σ x xᵀ).

        The ridge penalizes changes, so that a site keeps its weights if its features do not predict the residual.
        """
        factor = _cholesky(precise(self.gram), ridge)
        return torch.cholesky_solve(precise(self.cross.T), factor).T

    def error(self, change: torch.Tensor) -> float:
        """Return Σ ‖r - D x‖² for the change D, `[out_features, kept]` float64."""
        explained = change @ precise(self.gram) - 2 * precise(self.cross)
        return float(self.energy + (explained * change).sum())


@dataclass(frozen=True)
class Refit:
    """A change of weights, and how it was determined.

    Args:
        change (`Tensor[out_features, kept]`, *optional*): float64; `None` where no change is better.
        ridge (`float`): share of the mean diagonal.
        error_before, error_after (`float`, *optional*): mean ‖r‖² of held-out tokens, without a change and with the
            best change that was fitted on the other tokens; `None` if there are no held-out tokens.
        sources (`bool`, *optional*): whether the sources of the features changed too; `None` if they are not refitted.
    """

    change: torch.Tensor | None
    ridge: float
    error_before: float | None = None
    error_after: float | None = None
    sources: bool | None = None

    def projection(self, before: Projection) -> Projection:
        """Return the projection `before` with its weight changed."""
        if self.change is None:
            return before
        return replace(before, weight=back_to(precise(before.weight) + self.change, before.weight))

    def followed_by(self, later: Refit) -> Refit:
        """Return the sum of this change and a later one, which was fitted after the features had changed."""
        if later.change is None:
            return replace(self, error_after=later.error_before)
        change = later.change if self.change is None else self.change + later.change
        return replace(later, change=change, error_before=self.error_before)

    def summary(self) -> dict[str, float | bool | None]:
        """Return how the change was determined, as JSON values."""
        summary = {
            "refitted": self.change is not None,
            "ridge": self.ridge,
            "held_out_error_before": self.error_before,
            "held_out_error_after": self.error_after,
        }
        return summary if self.sources is None else {**summary, "sources_refitted": self.sources}


def refit(fit: NormalEquations, held_out: NormalEquations | None, ridge: float | None = None) -> Refit:
    """Choose the ridge on held-out tokens and fit on all tokens, or return no change where held-out tokens get worse.

    Args:
        fit (`NormalEquations`): most of the tokens.
        held_out (`NormalEquations`, *optional*): the other tokens.
        ridge (`float`, *optional*): the ridge; by default the best one on held-out tokens.
    """
    if held_out is None:
        ridge = DEFAULT_RIDGE if ridge is None else ridge
        return Refit(fit.change(ridge), ridge)
    best = best_ridge(fit, held_out) if ridge is None else ridge
    error, energy = held_out.error(fit.change(best)), float(held_out.energy)
    change = (fit + held_out).change(best) if error < energy else None
    return Refit(change, best, energy / held_out.count, error / held_out.count)


def best_ridge(fit: NormalEquations, held_out: NormalEquations) -> float:
    """Return the ridge with the smallest error on held-out tokens."""
    fit, held_out = fit.mixed(), held_out.mixed()
    errors = {candidate: held_out.error(fit.change(candidate)) for candidate in RIDGES}
    return min(errors, key=lambda candidate: errors[candidate])


def nested_changes(
    gram: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, widths: Sequence[int], ridge: float
) -> Iterator[torch.Tensor]:
    """Yield the change of W if the first `width` features of `order` are kept, `[out_features, width]`, float64.

    The sets are nested, so that the leading blocks of one Cholesky factor are the factors for all of them.

    Args:
        gram (`Tensor[in_features, in_features]`): Σ x xᵀ.
        weight (`Tensor[out_features, in_features]`): W.
        order (`Tensor[in_features]`, int64): features in the reverse order of their removal.
        widths (sequence of `int`): numbers of kept features.
        ridge (`float`): share of the mean diagonal.
    """
    gram = precise(gram[order][:, order])
    weight = precise(weight[:, order])
    factor = _cholesky(gram, ridge)
    for width in widths:
        # These entries are off the diagonal, to which the ridge was added.
        lost = weight[:, width:] @ gram[width:, :width]
        yield torch.cholesky_solve(lost.T, factor[:width, :width]).T


def _cholesky(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Add the ridge to the diagonal of `gram`, and more while it is indefinite by rounding, and return the factor."""
    mean = float(gram.diagonal().mean())
    # With the smallest normal number, sites whose inputs are all 0 can be solved.
    gram.diagonal().add_(ridge * mean + torch.finfo(torch.float32).tiny)
    for more in (0.0, *LAST_RIDGES):
        gram.diagonal().add_(more * mean)
        factor, info = torch.linalg.cholesky_ex(gram)
        if not info.item():
            return factor
    raise ValueError("The activations contain NaN or infinity, so that no weights can be fitted to them.")
