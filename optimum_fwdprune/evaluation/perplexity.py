"""Perplexity over token windows, computed from exact sums of negative log-likelihoods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.positions import check_length, positions_of
from ..forward.losses import model_nll
from ..loading.state import evaluating
from ..loading.tokenizers import tokens_around
from ..runs.progress import progress


# Tokens per window by default.
MAX_LENGTH = 512


@dataclass(frozen=True)
class TextLoss:
    """A model's loss on some tokens.

    Args:
        nll (`float`): sum of negative log-likelihoods, in nats.
        tokens (`int`): number of predicted tokens.
    """

    nll: float
    tokens: int

    def __add__(self, other: TextLoss) -> TextLoss:
        return TextLoss(self.nll + other.nll, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(Σ negative log-likelihood / Σ predicted tokens)."""
        return math.exp(self.loss)


@torch.no_grad()
def text_loss(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    start: Sequence[int] = (),
) -> TextLoss:
    """Return the loss of `model` on a text of any length, computed in windows.

    Disjoint windows, the default, are the usual way to report perplexity: tokens are predicted within their window
    alone, and the first token of a window is not predicted. With `stride` below `max_length` windows overlap, and
    every token but the text's first is predicted exactly once, from at least `max_length - stride` tokens before it if
    there are so many. The last window may be shorter; nothing is padded or dropped.

    Args:
        model (`PreTrainedModel`): a causal language model.
        input_ids (`Tensor[tokens]`, int64): the text.
        max_length (`int`, *optional*): longest window; by default 512, or the model's number of positions if that is
            smaller.
        stride (`int`, *optional*): tokens between the starts of two windows; by default `max_length`, without `start`.
        batch_size (`int`, defaults to 4): windows per forward pass.
        start (sequence of `int`, *optional*): special tokens that every window starts with, such as BOS. They count in
            `max_length`, and the first token after them is predicted.

    Raises:
        ValueError: where the text is too short to predict a token, or the windows are too long for the model.
    """
    _check_batch_size(batch_size)
    length_of_text, stride = _checked_windows(model, input_ids, max_length, stride, len(start))
    total = TextLoss(0.0, 0)
    before = torch.tensor(start, dtype=input_ids.dtype)
    batches = list(_batches(len(input_ids), length_of_text, stride, batch_size, len(start)))
    with evaluating(model):
        for places, length, first in progress(batches, "Measuring perplexity", unit="batch"):
            windows = torch.stack([torch.cat([before, input_ids[place : place + length]]) for place in places])
            sums, counts = model_nll(model, windows, first=first)
            total += TextLoss(float(sums.sum()), int(counts.sum()))
    return total


def texts_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
) -> TextLoss:
    """Return the loss of `model` on texts that are joined without a separator (see [`text_loss`]). Every window starts
    with the special tokens that the tokenizer writes before a text."""
    # verbose=False: the tokenizer would warn of texts longer than the model's context, which are allowed here.
    ids = tokenizer("".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    start, _ = tokens_around(tokenizer)
    return text_loss(model, torch.tensor(ids, dtype=torch.int64), max_length, stride, batch_size, start)


@torch.no_grad()
def window_losses(model: PreTrainedModel, input_ids: torch.Tensor, batch_size: int = 4) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window, in nats: `[windows]`, float64.

    The differences between two models, window by window, vary much less than the losses themselves.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode.
        input_ids (`Tensor[windows, seq_len]`, int64): every token but the first of each window is predicted.
        batch_size (`int`, defaults to 4): windows per forward pass.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [windows, seq_len] with seq_len >= 2; got {tuple(input_ids.shape)}.")
    _check_batch_size(batch_size)
    losses = []
    for batch in progress(input_ids.split(batch_size), "Measuring perplexity", unit="batch"):
        sums, counts = model_nll(model, batch)
        losses.append((sums / counts).cpu())
    return torch.cat(losses)


def perplexity(model: PreTrainedModel, input_ids: torch.Tensor, batch_size: int = 4) -> float:
    """Return exp(Σ negative log-likelihood / Σ predicted tokens) over disjoint windows.

    The arguments are those of [`window_losses`].
    """
    return math.exp(float(window_losses(model, input_ids, batch_size).mean()))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")


def _checked_windows(
    model: PreTrainedModel, input_ids: torch.Tensor, max_length: int | None, stride: int | None, start: int
) -> tuple[int, int]:
    """Return the tokens of text per window, without the `start` tokens before them, and the stride."""
    if input_ids.dim() != 1 or not len(input_ids) or len(input_ids) + start < 2:
        raise ValueError(
            f"A text needs two tokens, in a tensor [tokens], to predict one; got {tuple(input_ids.shape)}."
        )
    if max_length is None:
        max_length = min(MAX_LENGTH, positions_of(model.config) or MAX_LENGTH)
    of_text = max_length - start
    stride = of_text if stride is None else stride
    shortest = max(2, start + 1)
    if max_length < shortest or not 1 <= stride <= of_text:
        raise ValueError(
            f"max_length must be at least {shortest} and stride from 1 to {of_text if start else 'max_length'}; got "
            f"{max_length} and {stride}."
            + (f" Every window starts with {start} special tokens of the tokenizer." if start else "")
        )
    check_length(max_length, model.config)
    return of_text, stride


def _batches(
    tokens: int, max_length: int, stride: int, batch_size: int, before: int
) -> Iterator[tuple[list[int], int, int]]:
    """Yield the starts of a batch's windows, the length of their text, and the first place in them that is predicted,
    counted from the first of the `before` tokens before the text."""
    # The last window is the first one that reaches the end. A window of a single token predicts nothing.
    starts = list(range(0, tokens, stride))
    starts = starts[: next(number for number, start in enumerate(starts, 1) if start + max_length >= tokens)]
    overlap = max_length - stride
    if len(starts) > 1 and not overlap and not before and tokens - starts[-1] < 2:
        starts.pop()
    # A window predicts the tokens that no window before it predicted: those after the overlap, or all but its first.
    full = starts[1:-1]
    yield starts[:1], min(max_length, tokens), max(before, 1)
    for place in range(0, len(full), batch_size):
        yield full[place : place + batch_size], max_length, max(before + overlap, 1)
    if len(starts) > 1:
        last = starts[-1]
        yield [last], min(max_length, tokens - last), max(before + overlap, 1)
