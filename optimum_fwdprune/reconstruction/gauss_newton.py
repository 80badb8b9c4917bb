"""Gauss-Newton steps for the linears in front of an activation, whose features one projection reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..runs import ranks
from ..runs.devices import back_to, precise, precise_sum


# Of the Kronecker-factored curvature: what its factors' mean diagonals are raised by, and how much of it, beside the
# exact curvature, holds the weights where they are.
FACTOR_DAMPING, PULL = 1e-2, 0.3

# Tokens of a linearized problem that are on the device at the same time.
TOKENS_AT_ONCE = 2**13

# Conjugate gradient steps at most; held-out tokens stop earlier.
STEPS = 6


@dataclass(frozen=True)
class Linearized:
    """What small changes D_k of the sources do to the output y = W a on some tokens: Σ_k W (s_k ∘ D_k x).

    A source that holds the rows of several, as one linear for gate and up, counts as several. What a 16-bit model
    computed stays in 16 bit, which halves most of the memory. Products are in bfloat16 where the model is, several
    times as fast as in float32: steps are few and damped, and held-out tokens judge them. Sums over batches are in
    float32.

    Args:
        inputs (`Tensor[tokens, in_features]`): x, what all sources read.
        slopes (`Tensor[sources, tokens, kept]`): s_k, derivatives of the features a by the sources' outputs.
        residual (`Tensor[tokens, out_features]`, float32): what is wanted of the output and is not there.
    """

    inputs: torch.Tensor
    slopes: torch.Tensor
    residual: torch.Tensor

    def outputs(self, changes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return what `changes`, `[sources, kept, in_features]`, do to the output: `[tokens, out_features]`."""
        inputs, weight, changes = self._to_multiply(self.inputs, weight, changes)
        features = sum(slope * (inputs @ change.T) for slope, change in zip(self.slopes, changes))
        return (features @ weight.T).to(self.residual.dtype)

    def gradient(self, outputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the transpose of [`outputs`]: `[tokens, out_features]` -> `[sources, kept, in_features]`."""
        inputs, weight, outputs = self._to_multiply(self.inputs, weight, outputs)
        features = outputs @ weight
        return torch.stack([(features * slope).T @ inputs for slope in self.slopes]).to(self.residual.dtype)

    def part(self, tokens: slice, device: torch.device) -> Linearized:
        """Return some of the tokens, on a device."""
        parts = (self.inputs[tokens], self.slopes[:, tokens], self.residual[tokens])
        return Linearized(*(part.to(device, non_blocking=True) for part in parts))

    def _to_multiply(self, inputs: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        """The factors in one dtype."""
        dtype = torch.bfloat16 if inputs.dtype == torch.bfloat16 else self.residual.dtype
        return [tensor.to(dtype) for tensor in (inputs, *others)]


@dataclass(frozen=True)
class LeastSquares:
    """The linearized problem: changes of the sources that leave least of the residual on all tokens of all processes.

    Args:
        batches (sequence of `Linearized`): the tokens of this process, in the memory of the host; none where it has no
            share of them.
        weight (`Tensor[out_features, kept]`, float32): W.
        shape (`tuple[int, int, int]`): of the changes: sources, kept, in_features.
    """

    batches: Sequence[Linearized]
    weight: torch.Tensor
    shape: tuple[int, int, int]

    def error(self, changes: torch.Tensor | None = None) -> float:
        """Return the summed squares of what `changes` leave of the residual; by default no changes."""
        return summed_squares(
            part.residual if changes is None else part.residual - part.outputs(changes, self.weight)
            for part in self._parts()
        )

    def gradient(self) -> torch.Tensor:
        """Return the direction in which the error falls fastest, halved: `[sources, kept, in_features]`."""
        return self._summed(self.shape, (part.gradient(part.residual, self.weight) for part in self._parts()))

    def curved(self, changes: torch.Tensor) -> torch.Tensor:
        """Return by how much `changes` take away of the gradient, of their shape."""
        moved = (part.gradient(part.outputs(changes, self.weight), self.weight) for part in self._parts())
        return self._summed(self.shape, moved)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the Kronecker factors of the curvature: Σ s_k s_kᵀ ∘ Wᵀ W per token, `[sources, kept, kept]`, and
        Σ x xᵀ, `[in_features, in_features]`, both damped."""
        sources, kept, width = self.shape
        inputs = self._summed((width, width), (_products(part.inputs, self.weight.dtype) for part in self._parts()))
        slopes = self._summed(
            (sources, kept, kept), (_products(part.slopes, self.weight.dtype) for part in self._parts())
        )
        tokens = ranks.summed(self.weight.new_tensor([sum(len(batch.inputs) for batch in self.batches)]))
        features = slopes / tokens * (self.weight.T @ self.weight)
        return torch.stack([_damped(factor) for factor in features]), _damped(inputs)

    def _parts(self) -> Iterator[Linearized]:
        """The tokens, so many at a time where the weights are."""
        for batch in self.batches:
            for start in range(0, len(batch.inputs), TOKENS_AT_ONCE):
                yield batch.part(slice(start, start + TOKENS_AT_ONCE), self.weight.device)

    def _summed(self, shape: Sequence[int], parts: Iterable[torch.Tensor]) -> torch.Tensor:
        total = self.weight.new_zeros(shape)
        for part in parts:
            total += part
        return ranks.summed(total)


def summed_squares(parts: Iterable[torch.Tensor]) -> float:
    """Return the sum of squares over the tensors of all processes, one at a time."""
    sums = [precise_sum(part.square()) for part in parts]
    # One wait for all parts.
    total = torch.stack(sums).sum().cpu() if sums else torch.zeros((), dtype=torch.float64, device="cpu")
    return float(ranks.summed(total[None]))


def gauss_newton_changes(fit: LeastSquares, held_out: LeastSquares) -> tuple[torch.Tensor | None, float]:
    """Return changes of the sources' weights that bring the output nearer to what is wanted.

    Conjugate gradients on the linearized least squares, preconditioned by, and pulled to no change by, its
    Kronecker-factored curvature Σ x xᵀ ⊗ (Σ s_k s_kᵀ ∘ Wᵀ W) (K-FAC, arXiv 1503.05671). It stops when the held-out
    tokens gain no more.

    Args:
        fit (`LeastSquares`): most of the tokens.
        held_out (`LeastSquares`): the others.

    Returns:
        `Tensor[sources, kept, in_features]`, or `None` where the first step already makes held-out tokens worse; and
        what held-out tokens miss without them, summed squares.
    """
    before = held_out.error()
    best, lowest = None, before
    for changes in _conjugate_gradients(fit):
        error = held_out.error(changes)
        # Neither is NaN an improvement.
        if not error < lowest:
            break
        best, lowest = changes, error
    return best, before


def _conjugate_gradients(fit: LeastSquares) -> Iterator[torch.Tensor]:
    features, inputs = fit.factors()
    inverses = [back_to(torch.linalg.inv(precise(factor)), factor) for factor in (features, inputs)]
    residual = fit.gradient()
    changes = torch.zeros_like(residual)
    direction = preconditioned = inverses[0] @ residual @ inverses[1]
    norm = (residual * preconditioned).sum()
    for _ in range(STEPS):
        if not norm > 0:
            return
        curved = fit.curved(direction) + PULL * (features @ direction @ inputs)
        length = norm / (direction * curved).sum()
        changes = changes + length * direction
        yield changes
        residual = residual - length * curved
        preconditioned = inverses[0] @ residual @ inverses[1]
        before, norm = norm, (residual * preconditioned).sum()
        direction = preconditioned + norm / before * direction


def _products(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums over tokens of the products of features: `[..., tokens, features]` -> `[..., features, features]`."""
    values = values.to(dtype)
    return values.mT @ values


def _damped(factor: torch.Tensor) -> torch.Tensor:
    """A factor of the curvature that can be inverted, features that are never used included."""
    factor = factor.clone()
    mean = factor.diagonal().mean()
    factor.diagonal().add_(FACTOR_DAMPING * mean + torch.finfo(torch.float32).tiny)
    return factor
