"""Perplexity over token windows, exact to the sum of negative log-likelihoods."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..utils import progress


@torch.no_grad()
def perplexity(model: PreTrainedModel, input_ids: torch.Tensor, batch_size: int = 4) -> float:
    """Return exp(Σ negative log-likelihood / Σ predicted tokens) over disjoint windows.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode.
        input_ids (`Tensor[windows, seq_len]`, int64): every token but the first of each window is predicted.
        batch_size (`int`, defaults to 4): windows per forward pass.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [windows, seq_len] with seq_len >= 2; got {tuple(input_ids.shape)}.")
    total = 0.0
    for batch in progress(input_ids.split(batch_size), "Perplexity", unit="batch"):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (input_ids.shape[0] * (input_ids.shape[1] - 1)))
