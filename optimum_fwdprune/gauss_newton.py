"""Gauss-Newton steps for the linears in front of an activation, whose features one projection reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import ranks
from .architectures import Site


# Of the Kronecker-factored curvature: what its factors' mean diagonals are raised by, and how much of it, beside the
# exact curvature, holds the weights where they are.
FACTOR_DAMPING, PULL = 1e-2, 0.3

# Conjugate gradient steps at most; held-out tokens stop earlier.
STEPS = 6


@dataclass(frozen=True)
class Linearized:
    """What small changes D_k of the sources do to the output y = W a on some tokens: Σ_k W (s_k ∘ D_k x).

    Args:
        inputs (`Tensor[tokens, in_features]`, float32): x, what all sources read.
        slopes (`Tensor[sources, tokens, kept]`, float32): s_k, derivatives of the features a by the sources' outputs.
        residual (`Tensor[tokens, out_features]`, float32): what is wanted of the output and is not there.
    """

    inputs: torch.Tensor
    slopes: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def empty(cls, site: Site, weight: torch.Tensor) -> Linearized:
        """Return no tokens yet of a site whose projection has the kept columns `weight`."""
        inputs = torch.zeros(0, site.sources[0].linear.in_features, device=weight.device)
        rows = sum(len(source.segments) for source in site.sources)
        slopes = torch.zeros(rows, 0, weight.shape[1], device=weight.device)
        return cls(inputs, slopes, torch.zeros(0, weight.shape[0], device=weight.device))

    @classmethod
    def cat(cls, parts: Sequence[Linearized]) -> Linearized:
        """Return all tokens of `parts`."""
        return cls(
            torch.cat([part.inputs for part in parts]),
            torch.cat([part.slopes for part in parts], dim=1),
            torch.cat([part.residual for part in parts]),
        )

    def outputs(self, changes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return what `changes`, `[sources, kept, in_features]`, do to the output: `[tokens, out_features]`."""
        features = sum(slope * (self.inputs @ change.T) for slope, change in zip(self.slopes, changes))
        return features @ weight.T

    def gradient(self, outputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the transpose of [`outputs`]: `[tokens, out_features]` -> `[sources, kept, in_features]`, summed over
        the tokens of all processes."""
        features = outputs @ weight
        return ranks.summed(torch.stack([(features * slope).T @ self.inputs for slope in self.slopes]))

    def error(self, changes: torch.Tensor, weight: torch.Tensor) -> float:
        """Return the summed squares of what `changes` leave of the residual, over the tokens of all processes."""
        left = self.residual - self.outputs(changes, weight)
        return float(ranks.summed(left.square().sum(dtype=torch.float64)))


def gauss_newton_changes(fit: Linearized, held_out: Linearized, weight: torch.Tensor) -> torch.Tensor | None:
    """Return changes of the sources' weights that bring the output nearer to what is wanted.

    Conjugate gradients on the linearized least squares, preconditioned by, and pulled to no change by, its
    Kronecker-factored curvature Σ x xᵀ ⊗ (Σ s_k s_kᵀ ∘ Wᵀ W) (K-FAC, arXiv 1503.05671). It stops when the held-out
    tokens gain no more.

    Args:
        fit (`Linearized`): most of the tokens.
        held_out (`Linearized`): the others.
        weight (`Tensor[out_features, kept]`, float32): W.

    Returns:
        `Tensor[sources, kept, in_features]`, or `None` where the first step already makes held-out tokens worse.
    """
    best = None
    best_error = float(ranks.summed(held_out.residual.square().sum(dtype=torch.float64)))
    for changes in _conjugate_gradients(fit, weight):
        error = held_out.error(changes, weight)
        # Neither is NaN an improvement.
        if not error < best_error:
            break
        best, best_error = changes, error
    return best


def _conjugate_gradients(fit: Linearized, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    counts = ranks.summed(torch.tensor(float(len(fit.inputs)), dtype=torch.float64))
    inputs = _damped(ranks.summed(fit.inputs.T @ fit.inputs))
    features = torch.stack([slope.T @ slope for slope in fit.slopes]) * (weight.T @ weight)
    features = torch.stack([_damped(factor / float(counts)) for factor in ranks.summed(features)])
    inverses = [torch.linalg.inv(factor.double()).to(factor.dtype) for factor in (features, inputs)]

    residual = fit.gradient(fit.residual, weight)
    changes = torch.zeros_like(residual)
    direction = preconditioned = inverses[0] @ residual @ inverses[1]
    norm = (residual * preconditioned).sum()
    for _ in range(STEPS):
        if not norm > 0:
            return
        curved = fit.gradient(fit.outputs(direction, weight), weight) + PULL * (features @ direction @ inputs)
        length = norm / (direction * curved).sum()
        changes = changes + length * direction
        yield changes
        residual = residual - length * curved
        preconditioned = inverses[0] @ residual @ inverses[1]
        before, norm = norm, (residual * preconditioned).sum()
        direction = preconditioned + norm / before * direction


def _damped(factor: torch.Tensor) -> torch.Tensor:
    """A factor of the curvature that can be inverted, features that are never used included."""
    factor = factor.clone()
    mean = factor.diagonal().mean()
    factor.diagonal().add_(FACTOR_DAMPING * mean + torch.finfo(torch.float32).tiny)
    return factor
