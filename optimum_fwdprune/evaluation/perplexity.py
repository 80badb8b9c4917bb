"""Perplexity over token windows, exact to the sum of negative log-likelihoods."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from ..losses import model_nll
from ..utils import progress


@torch.no_grad()
def window_losses(model: PreTrainedModel, input_ids: torch.Tensor, batch_size: int = 4) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window, in nats: `[windows]`, float64.

    Two models are compared by the differences of these, window by window, which vary far less than the losses do.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode.
        input_ids (`Tensor[windows, seq_len]`, int64): every token but the first of each window is predicted.
        batch_size (`int`, defaults to 4): windows per forward pass.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [windows, seq_len] with seq_len >= 2; got {tuple(input_ids.shape)}.")
    losses = []
    for batch in progress(input_ids.split(batch_size), "Perplexity", unit="batch"):
        sums, counts = model_nll(model, batch)
        losses.append((sums / counts).cpu())
    return torch.cat(losses)


def perplexity(model: PreTrainedModel, input_ids: torch.Tensor, batch_size: int = 4) -> float:
    """Return exp(Σ negative log-likelihood / Σ predicted tokens) over disjoint windows.

    The arguments are those of [`window_losses`].
    """
    return math.exp(float(window_losses(model, input_ids, batch_size).mean()))
