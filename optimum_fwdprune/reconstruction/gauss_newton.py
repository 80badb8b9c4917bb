"""Gauss-Newton steps for the linears before an activation, whose features one projection reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..runs import ranks
from ..runs.devices import back_to, on_host, precise, precise_sum


# Damping of the factors of the Kronecker-factored curvature, as a share of their mean diagonals; and the share of this
# curvature that is added to the exact curvature as a penalty on changes.
FACTOR_DAMPING, PULL = 1e-2, 0.3

# Number of tokens of a linearized problem that are on the device at a time.
TOKENS_AT_ONCE = 2**13

# Largest number of conjugate gradient steps; they stop earlier if held-out tokens no longer improve.
STEPS = 6


@dataclass(frozen=True)
class Linearized:
    """The effect of small changes D_k of the sources on the output y = W a for some tokens: Σ_k W (s_k ∘ D_k x).

    A source with the rows of several linears, such as one linear for gate and up, counts as several. Activations of a
    16-bit model are stored in 16 bit, which halves most of the memory. Products are in bfloat16 if the model is, which
    is several times as fast as float32. This is precise enough, since steps are few and damped, and held-out tokens
    decide whether they are taken. Sums over batches are in float32.

    Args:
        inputs (`Tensor[tokens, in_features]`): x, the inputs of all sources.
        slopes (`Tensor[sources, tokens, kept]`): s_k, derivatives of the features a by the sources' outputs.
        residual (`Tensor[tokens, out_features]`, float32): the target minus the output.
    """

    inputs: torch.Tensor
    slopes: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def stored(cls, inputs: torch.Tensor, slopes: torch.Tensor, residual: torch.Tensor) -> Linearized:
        """Return the effect in the memory of the host, in float32 at most."""
        inputs, slopes = (values.float() if values.dtype.itemsize > 4 else values for values in (inputs, slopes))
        return cls(on_host(inputs), on_host(slopes), on_host(residual.float()))

    def outputs(self, changes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the effect of `changes`, `[sources, kept, in_features]`, on the output: `[tokens, out_features]`."""
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
        """Return the factors of a product in its dtype."""
        dtype = torch.bfloat16 if inputs.dtype == torch.bfloat16 else self.residual.dtype
        return [tensor.to(dtype) for tensor in (inputs, *others)]


@dataclass(frozen=True)
class LeastSquares:
    """The linearized problem: changes of the sources that minimize the residual over all tokens of all processes.

    Args:
        batches (sequence of `Linearized`): the tokens of this process, in the memory of the host; may be empty.
        weight (`Tensor[out_features, kept]`, float32): W.
        shape (`tuple[int, int, int]`): shape of the changes: sources, kept, in_features.
    """

    batches: Sequence[Linearized]
    weight: torch.Tensor
    shape: tuple[int, int, int]

    def error(self, changes: torch.Tensor | None = None) -> float:
        """Return the sum of squares of the residual after `changes`; by default without changes."""
        return summed_squares(
            part.residual if changes is None else part.residual - part.outputs(changes, self.weight)
            for part in self._parts()
        )

    def gradient(self) -> torch.Tensor:
        """Return half of the negative gradient of the error: `[sources, kept, in_features]`."""
        return self._summed(self.shape, (part.gradient(part.residual, self.weight) for part in self._parts()))

    def curved(self, changes: torch.Tensor) -> torch.Tensor:
        """Return the curvature times `changes`, in their shape: the difference that they make to the gradient."""
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
        """Yield the tokens on the device of the weight, `TOKENS_AT_ONCE` at a time."""
        for batch in self.batches:
            for start in range(0, len(batch.inputs), TOKENS_AT_ONCE):
                yield batch.part(slice(start, start + TOKENS_AT_ONCE), self.weight.device)

    def _summed(self, shape: Sequence[int], parts: Iterable[torch.Tensor]) -> torch.Tensor:
        total = self.weight.new_zeros(shape)
        for part in parts:
            total += part
        return ranks.summed(total)


def summed_squares(parts: Iterable[torch.Tensor]) -> float:
    """Return the sum of squares over the tensors of all processes, which are computed one at a time."""
    sums = [precise_sum(part.square()) for part in parts]
    # The device is waited for once instead of once per part.
    total = torch.stack(sums).sum().cpu() if sums else torch.zeros((), dtype=torch.float64, device="cpu")
    return float(ranks.summed(total[None]))


def gauss_newton_changes(fit: LeastSquares, held_out: LeastSquares) -> tuple[torch.Tensor | None, float]:
    """Return changes of the sources' weights that bring the output closer to its target.

    The method is conjugate gradients on the linearized least squares. The Kronecker-factored curvature Σ x xᵀ ⊗
    (Σ s_k s_kᵀ ∘ Wᵀ W) (K-FAC, arXiv 1503.05671) is the preconditioner and the penalty on changes. The steps end once
    the error on held-out tokens does not fall.

    Args:
        fit (`LeastSquares`): most of the tokens.
        held_out (`LeastSquares`): the other tokens.

    Returns:
        `Tensor[sources, kept, in_features]`, or `None` where the first step increases the error on held-out tokens;
        and this error without changes, a sum of squares.
    """
    before = held_out.error()
    best, lowest = None, before
    for changes in _conjugate_gradients(fit):
        error = held_out.error(changes)
        # NaN is not an improvement either.
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
    """Return sums over tokens of products of features: `[..., tokens, features]` -> `[..., features, features]`."""
    values = values.to(dtype)
    return values.mT @ values


def _damped(factor: torch.Tensor) -> torch.Tensor:
    """Return a factor of the curvature with damping, so that it is invertible even with unused features."""
    factor = factor.clone()
    mean = factor.diagonal().mean()
    factor.diagonal().add_(FACTOR_DAMPING * mean + torch.finfo(torch.float32).tiny)
    return factor
