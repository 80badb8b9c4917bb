"""The calibration loss: negative log-likelihood of the next token, for models in any dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.calibration import counted_targets
from ..loading.offloading import input_device
from ..runs.devices import precise


# Arguments of models that are run for hidden states or logits. Their configs may request hidden states and attentions
# of every layer, which would take memory, and which replaced layers do not return.
PLAIN_OUTPUTS = {"use_cache": False, "output_attentions": False, "output_hidden_states": False, "return_dict": True}

# Number of logits that are converted to probabilities at a time, since a copy of all logits would double the peak.
LOGITS_AT_ONCE = 2**23


def plain_outputs(model: PreTrainedModel) -> dict[str, bool]:
    """Return `PLAIN_OUTPUTS` for a model. A mixture leaves out the logits of its routers, too: with these, its first
    output would be the load-balancing loss."""
    has_routers = hasattr(model.config.get_text_config(), "output_router_logits")
    return {**PLAIN_OUTPUTS, "output_router_logits": False} if has_routers else PLAIN_OUTPUTS


def model_nll(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    first: int = 1,
    answers: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch through `model` and return [`next_token_nll`] of its logits.

    Raises:
        ValueError: where the model predicts no tokens, or where there are other inputs than tokens, such as images.
    """
    check_predicts(model)
    if inputs:
        raise ValueError(
            f"The loss is computed of text alone, and the data has {', '.join(inputs)}. Use a method that measures "
            f"activations, such as wanda_sp or flap, or calibrate on text."
        )
    device = input_device(model)
    input_ids = input_ids.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **plain_outputs(model)).logits
    return next_token_nll(logits, input_ids, attention_mask, first, answers)


def check_predicts(model: PreTrainedModel) -> None:
    """Raise `ValueError` where a model predicts no tokens."""
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} does not predict the next token, and the loss needs a causal language model. "
            f"Prune its causal counterpart, and replay the plan on this model."
        )


def next_token_nll(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    first: int = 1,
    answers: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of every sequence, and the number of tokens that it is the sum over.

    The loss of several sequences is Σ likelihoods / Σ tokens, which depends on neither batch size nor padding.

    Args:
        logits (`Tensor[batch_size, seq_len, vocab_size]`): logits in any float dtype; float32 terms are summed in
            float64.
        input_ids (`Tensor[batch_size, seq_len]`, int64): every token but the first is predicted.
        attention_mask (`Tensor[batch_size, seq_len]`, *optional*): a token counts if neither it nor the token before
            is padding.
        first (`int`, defaults to 1): index of the first token that counts; tokens before it are context.
        answers (`Tensor[batch_size, seq_len]`, bool, *optional*): the tokens that count; by default all.

    Returns:
        `Tensor[batch_size]` float64 in nats, and `Tensor[batch_size]` int64.
    """
    targets = input_ids[:, first:].to(logits.device)
    counted = counted_targets(input_ids, attention_mask)[:, first - 1 :].to(logits.device)
    if answers is not None:
        counted &= answers[:, first:].to(logits.device)
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    rows = []
    for row in range(len(targets)):
        terms = [
            F.cross_entropy(_at_least_float32(piece), target, reduction="none")
            for piece, target in zip(logits[row, first - 1 : -1].split(at_once), targets[row].split(at_once))
        ]
        rows.append(torch.cat(terms))
    # Padding may have NaN, which a product with the mask would keep.
    sums = precise(torch.stack(rows).where(counted, 0)).sum(1)
    return sums, counted.sum(1).to(sums.device)


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
