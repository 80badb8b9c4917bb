"""The dense model's distributions on fixed tokens, which pruned models are compared with in one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..data.calibration import Calibration
from ..loading.offloading import resident
from ..loading.state import evaluating
from ..runs.devices import on_host, precise_sum
from ..runs.progress import progress
from .divergence import EVERY
from .layerwise import Batch, LayerRunner
from .losses import LOGITS_AT_ONCE, check_predicts, next_token_nll


@dataclass(frozen=True)
class Likeness:
    """The loss of a model on some tokens, and its divergence from the dense model.

    Args:
        nll (`float`): sum of negative log-likelihoods, in nats.
        tokens (`int`): number of predicted tokens.
        divergence (`float`): mean KL divergence KL(dense ‖ model) of next-token distributions at every fourth token,
            in nats per token.
    """

    nll: float
    tokens: int
    divergence: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens


class Reference:
    """The dense model on fixed tokens. Its last hidden states are kept, so that it runs once for all comparisons.

    Args:
        model (`PreTrainedModel`): the dense causal language model, which is not changed.
        windows (sequence of `Calibration`): the tokens; windows of one `Calibration` have the same length.
        batch_size (`int`): windows per forward pass.

    Attributes:
        dense (`Likeness`): the dense model's own loss; its divergence is 0.

    Raises:
        ValueError: where the model does not predict tokens, or there is no token to predict.
    """

    def __init__(self, model: PreTrainedModel, windows: Sequence[Calibration], batch_size: int):
        check_predicts(model)
        self._model, self._windows, self._batch_size = model, windows, batch_size
        self._last: list[torch.Tensor] = []
        with evaluating(model):
            runner = LayerRunner(model)
            batches = self._batches(runner)
            self._last = _last_hidden(runner, batches, "Running the dense model")
            nll, tokens = 0.0, 0
            for batch, hidden in zip(batches, self._last):
                sums, counts = next_token_nll(runner.logits(batch, hidden), batch.input_ids, batch.attention_mask)
                nll, tokens = nll + float(sums.sum()), tokens + int(counts.sum())
        if not tokens:
            raise ValueError("The windows to measure on have no token to predict; use longer texts.")
        self.dense = Likeness(nll, tokens, 0.0)

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> Likeness:
        """Return the loss of a model of the same vocabulary, and its divergence from the dense model.

        The model may be the dense model itself, with projections that are replaced while this runs.
        """
        total, compared, nll = 0.0, 0, 0.0
        with evaluating(model), evaluating(self._model):
            runner, dense_runner = LayerRunner(model), LayerRunner(self._model)
            batches, dense_batches = self._batches(runner), self._batches(dense_runner)
            last = _last_hidden(runner, batches, "Measuring the pruned model")
            for batch, hidden, dense_batch, dense_hidden in zip(batches, last, dense_batches, self._last):
                logits = runner.logits(batch, hidden)
                sums, _ = next_token_nll(logits, batch.input_ids, batch.attention_mask)
                nll += float(sums.sum())
                every = slice(min(EVERY, hidden.shape[1]) - 1, None, min(EVERY, hidden.shape[1]))
                expected = dense_runner.logits(dense_batch, dense_hidden[:, every])
                divergences = _divergences(expected.flatten(0, 1), logits[:, every].flatten(0, 1))
                if batch.attention_mask is not None:
                    divergences = divergences[batch.attention_mask[:, every].bool().flatten().to(divergences.device)]
                total, compared = total + float(precise_sum(divergences)), compared + len(divergences)
        return Likeness(nll, self.dense.tokens, total / compared)

    def _batches(self, runner: LayerRunner) -> list[Batch]:
        return [batch for windows in self._windows for batch in runner.batches(windows, self._batch_size)]


@torch.no_grad()
def _last_hidden(runner: LayerRunner, batches: Sequence[Batch], what: str) -> list[torch.Tensor]:
    """Return the outputs of the last layer, `[windows, tokens, hidden]` per batch, in the memory of the host."""
    hidden = [on_host(runner.embed(batch)) for batch in batches]
    for number, layer in enumerate(progress(runner.layers, what, unit="layer")):
        with resident(layer):
            hidden = [on_host(runner.run(number, batch, values)) for batch, values in zip(batches, hidden)]
    return hidden


def _divergences(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL divergences of distributions by their logits, `[tokens, vocabulary]` -> `[tokens]` float32."""
    at_once, parts = max(1, LOGITS_AT_ONCE // logits.shape[-1]), []
    for dense, pruned in zip(expected.split(at_once), logits.to(expected.device).split(at_once)):
        log_dense, log_pruned = dense.float().log_softmax(-1), pruned.float().log_softmax(-1)
        parts.append((log_dense.exp() * (log_dense - log_pruned)).sum(-1))
    return torch.cat(parts)
