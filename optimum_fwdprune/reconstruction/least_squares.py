"""The regression behind reconstruction: what kept input features can say about an output, with its ridge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..forward.gates import Projection
from ..runs import ranks
from ..runs.devices import (
    back_to,
    precise,
    precise_device,
    precise_sum,
)


# Shares of the mean diagonal of the Gram matrix that may be added to its diagonal; held-out windows choose.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)

# What a ridge that was given is raised by, one after the other, while rounding leaves a Gram matrix indefinite.
LAST_RIDGES = (1e-6, 1e-4, 1e-2)

# Ridges are compared on so many random mixtures of the outputs where these are several times as many: the solution
# for all of them costs most, and which ridge is best is a question to the features.
MIXTURES = 256

# Where no window can be held out.
DEFAULT_RIDGE = 1e-2


@dataclass
class NormalEquations:
    """Sums over tokens of the kept features x and of the residual r: what is wanted minus what W x gives already.

    Args:
        gram (`Tensor[kept, kept]`): Σ x xᵀ.
        cross (`Tensor[out_features, kept]`): Σ r xᵀ.
        energy (`Tensor[]`, float64): Σ ‖r‖².
        count (`int`): tokens.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor
    count: int

    @classmethod
    def empty(cls, kept: int, out_features: int, device: torch.device) -> NormalEquations:
        """Return sums over no tokens yet, in float32."""
        zeros = torch.zeros(kept + out_features, kept, dtype=torch.float32, device=device)
        energy = torch.zeros((), dtype=torch.float64, device=precise_device(device))
        return cls(zeros[:kept], zeros[kept:], energy, 0)

    @classmethod
    def of_removed(cls, gram: torch.Tensor, count: int, weight: torch.Tensor, kept: torch.Tensor) -> NormalEquations:
        """Return the sums whose residual is what the removed features contributed, `W_r x_r`.

        Args:
            gram (`Tensor[in_features, in_features]`): Σ x xᵀ over all features.
            count (`int`): tokens.
            weight (`Tensor[out_features, in_features]`): W.
            kept (`Tensor[in_features]`, bool): which features stay.
        """
        lost = weight[:, ~kept].float()
        rows = gram[~kept]
        energy = precise_sum(lost @ rows[:, ~kept] * lost)
        return cls(gram[kept][:, kept], lost @ rows[:, kept], energy, count)

    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None:
        """Add tokens: `inputs`, `[tokens, kept]`, and `residual`, `[tokens, out_features]`, in any float dtype."""
        inputs, residual = inputs.float(), residual.float()
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(residual.T, inputs)
        self.energy += precise_sum(residual.square())
        self.count += len(inputs)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.count + other.count
        )

    def pooled(self) -> NormalEquations:
        """Return the sums over the tokens of all processes of a run; the own ones are used up."""
        if ranks.world_size() == 1:
            return self
        count = self.energy.new_tensor(self.count)
        energy, count = ranks.summed(torch.stack([self.energy, count]))
        return NormalEquations(ranks.summed(self.gram), ranks.summed(self.cross), energy, int(count))

    def mixed(self) -> NormalEquations:
        """Return what to compare ridges on: random mixtures of the outputs where they are many. `energy` stays that
        of all."""
        outputs = len(self.cross)
        if outputs < 4 * MIXTURES:
            return self
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (MIXTURES, outputs), generator=generator).to(self.cross) * 2 - 1
        return NormalEquations(self.gram, signs @ self.cross, self.energy, self.count)

    def change(self, ridge: float) -> torch.Tensor:
        """Return the change of W, `Σ r xᵀ (Σ x xᵀ + λ I)⁻¹`, float64, with λ = `ridge` · mean(diag Σ x xᵀ).

        It pulls towards no change, so a site whose features say nothing keeps its weights.
        """
        factor = _cholesky(precise(self.gram), ridge)
        return torch.cholesky_solve(precise(self.cross.T), factor).T

    def error(self, change: torch.Tensor) -> float:
        """Return Σ ‖r - D x‖² under the change D, `[out_features, kept]` float64."""
        explained = change @ precise(self.gram) - 2 * precise(self.cross)
        return float(self.energy + (explained * change).sum())


@dataclass(frozen=True)
class Refit:
    """A change of weights, and how it was settled.

    Args:
        change (`Tensor[out_features, kept]`, *optional*): float64; `None` where none is better than some.
        ridge (`float`): share of the mean diagonal.
        error_before, error_after (`float`, *optional*): mean ‖r‖² of a held-out token without a change and under the
            best one that the other tokens gave; `None` where none were held out.
        sources (`bool`, *optional*): whether the sources of the features changed too; `None` where they may not.
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
        """Return both changes as one, the second fitted after other features had changed."""
        if later.change is None:
            return replace(self, error_after=later.error_before)
        change = later.change if self.change is None else self.change + later.change
        return replace(later, change=change, error_before=self.error_before)

    def summary(self) -> dict[str, float | bool | None]:
        """Return how the change was settled, as JSON values."""
        summary = {
            "refitted": self.change is not None,
            "ridge": self.ridge,
            "held_out_error_before": self.error_before,
            "held_out_error_after": self.error_after,
        }
        return summary if self.sources is None else {**summary, "sources_refitted": self.sources}


def refit(fit: NormalEquations, held_out: NormalEquations | None, ridge: float | None = None) -> Refit:
    """Choose the ridge on held-out tokens and fit on all of them, or change nothing where that is no better.

    Args:
        fit (`NormalEquations`): most of the tokens.
        held_out (`NormalEquations`, *optional*): the others.
        ridge (`float`, *optional*): use this one.
    """
    if held_out is None:
        ridge = DEFAULT_RIDGE if ridge is None else ridge
        return Refit(fit.change(ridge), ridge)
    best = _best_ridge(fit.mixed(), held_out.mixed()) if ridge is None else ridge
    error, energy = held_out.error(fit.change(best)), float(held_out.energy)
    change = (fit + held_out).change(best) if error < energy else None
    return Refit(change, best, energy / held_out.count, error / held_out.count)


def _best_ridge(fit: NormalEquations, held_out: NormalEquations) -> float:
    errors = {candidate: held_out.error(fit.change(candidate)) for candidate in RIDGES}
    return min(errors, key=lambda candidate: errors[candidate])


def nested_changes(
    gram: torch.Tensor, weight: torch.Tensor, order: torch.Tensor, widths: Sequence[int], ridge: float
) -> Iterator[torch.Tensor]:
    """Yield the change of W when the first so many features of `order` stay, `[out_features, width]`, float64.

    The sets are nested, so the corners of one Cholesky factor are the factors of all of them.

    Args:
        gram (`Tensor[in_features, in_features]`): Σ x xᵀ.
        weight (`Tensor[out_features, in_features]`): W.
        order (`Tensor[in_features]`, int64): features, those that stay longest first.
        widths (sequence of `int`): how many stay.
        ridge (`float`): share of the mean diagonal.
    """
    gram = precise(gram[order][:, order])
    weight = precise(weight[:, order])
    factor = _cholesky(gram, ridge)
    for width in widths:
        # Beside the diagonal, which the ridge was added to.
        lost = weight[:, width:] @ gram[width:, :width]
        yield torch.cholesky_solve(lost.T, factor[:width, :width]).T


def _cholesky(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Add the ridge to the diagonal of `gram`, more of it where rounding made it indefinite, and return the factor."""
    mean = float(gram.diagonal().mean())
    # The smallest normal number keeps a site whose inputs are all zero solvable.
    gram.diagonal().add_(ridge * mean + torch.finfo(torch.float32).tiny)
    for more in (0.0, *LAST_RIDGES):
        gram.diagonal().add_(more * mean)
        factor, info = torch.linalg.cholesky_ex(gram)
        if not info.item():
            return factor
    raise ValueError("The activations contain NaN or infinity, so no weights can be fitted to them.")
