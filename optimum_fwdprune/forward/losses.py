"""The calibration loss: negative log-likelihood of the next token, whatever the dtype of the model."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.calibration import counted_targets
from ..loading.offloading import input_device
from ..runs.devices import precise


# How models are run for hidden states or logits, whatever else their configs ask for: states and attentions of every
# layer would be held for nothing, and layers that stand in for others return none.
PLAIN_OUTPUTS = {"use_cache": False, "output_attentions": False, "output_hidden_states": False, "return_dict": True}

# Logits that are turned into probabilities at once; a second copy of all of them would double the peak.
LOGITS_AT_ONCE = 2**23


def model_nll(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, first: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch through `model` and return what [`next_token_nll`] makes of its logits.

    Raises:
        ValueError: where the model predicts no tokens.
    """
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} predicts no next token; the loss needs a causal language model. Score its causal "
            f"counterpart and replay the plan."
        )
    device = input_device(model)
    input_ids = input_ids.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **PLAIN_OUTPUTS).logits
    return next_token_nll(logits, input_ids, attention_mask, first)


def next_token_nll(
    logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, first: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of every sequence, and the tokens that it was summed over.

    The loss of several sequences is Σ likelihoods / Σ tokens, which no batch size and no padding changes.

    Args:
        logits (`Tensor[batch_size, seq_len, vocab_size]`): in any float dtype; summed in float64 over float32 terms.
        input_ids (`Tensor[batch_size, seq_len]`, int64): every token but the first is predicted.
        attention_mask (`Tensor[batch_size, seq_len]`, *optional*): a token counts where it and the one before are no
            padding.
        first (`int`, defaults to 1): place of the first token that counts; those before it are context.

    Returns:
        `Tensor[batch_size]` float64 in nats, and `Tensor[batch_size]` int64.
    """
    targets = input_ids[:, first:].to(logits.device)
    counted = counted_targets(input_ids, attention_mask)[:, first - 1 :].to(logits.device)
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    rows = []
    for row in range(len(targets)):
        terms = [
            F.cross_entropy(_at_least_float32(piece), target, reduction="none")
            for piece, target in zip(logits[row, first - 1 : -1].split(at_once), targets[row].split(at_once))
        ]
        rows.append(torch.cat(terms))
    # Not a product with the mask: what a model says about padding may be NaN.
    sums = precise(torch.stack(rows).where(counted, 0)).sum(1)
    return sums, counted.sum(1).to(sums.device)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
