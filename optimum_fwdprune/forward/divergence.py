"""The divergence of a whole pruned model from the dense one, computed from the first layer that has changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from ..architectures import SiteKey
from ..data.calibration import Calibration
from ..forward.gates import Projection
from ..forward.layerwise import Batch, LayerRunner
from ..forward.losses import LOGITS_AT_ONCE
from ..forward.narrowing import narrowed
from ..loading.subject import Subject
from ..runs.devices import on_host, precise_sum
from ..runs.progress import progress


# Distributions are compared at every fourth token only: those of neighbours are similar, and logits are expensive.
EVERY = 4


class Divergence:
    """Mean KL divergence KL(dense ‖ pruned) of next-token distributions, in nats per token, on fixed windows.

    It costs as much as the loss and is far less noisy, since it compares two whole distributions at every token, and
    not the likelihoods of a single token. The dense model's distributions at every `EVERY`-th token are kept in
    float16. The hidden states before every layer of the model that was settled last are kept too.

    Args:
        subject (`Subject`): a causal language model in eval mode, which is not changed, with the sites whose
            projections may be replaced. For layers to be removed, these are all its sites.
        calibration (`Calibration`): the windows.
        batch_size (`int`): windows per forward pass.

    Attributes:
        windows (`float`): passes of a window through all layers so far.
    """

    def __init__(self, subject: Subject, calibration: Calibration, batch_size: int):
        self._sites = subject.sites
        self._runner = LayerRunner(subject.model)
        self._batches = self._runner.batches(calibration, batch_size)
        self._embedded = [on_host(self._runner.embed(batch)) for batch in self._batches]
        self._settled: list[list[torch.Tensor]] = []
        # The dense model's probabilities by batch, and the sum of their entropies.
        self._targets: list[torch.Tensor] = []
        self._entropy: torch.Tensor | float = 0.0
        self._tokens = 0
        self.windows = 0.0
        self._gone: set[int] = set()
        for batch, embedded in progress(
            list(zip(self._batches, self._embedded)), "Running the dense model", unit="batch"
        ):
            logits = self._logits(batch, self._through(batch, embedded, 0, None))
            log_probabilities = [part.float().log_softmax(-1) for part in logits.split(_at_once(logits))]
            target = torch.cat([part.exp().half() for part in log_probabilities])
            self._targets.append(on_host(target))
            for part, probabilities in zip(log_probabilities, target.split(_at_once(logits))):
                self._entropy = self._entropy - precise_sum(probabilities * part)
            self._tokens += len(logits)
        if not self._tokens:
            raise ValueError("The windows that models are compared on hold nothing but padding; use longer texts.")

    @property
    def layers(self) -> int:
        """Number of decoder layers of the model."""
        return len(self._runner.layers)

    def settle(self, projections: Mapping[SiteKey, Projection]) -> float:
        """Return the divergence with these projections, and keep their hidden states for later calls of `of`."""
        self._settled = [[hidden] for hidden in self._embedded]
        return self._measure(projections, 0, record=True)

    def of(self, projections: Mapping[SiteKey, Projection], first: int = 0) -> float:
        """Return the divergence with these projections, which must equal the settled ones before layer `first`."""
        return self._measure(projections, first, record=False)

    @torch.no_grad()
    def _measure(self, projections: Mapping[SiteKey, Projection], first: int, record: bool) -> float:
        # The host reads it once, after the last batch.
        total: torch.Tensor | float = 0.0
        with narrowed(self._sites, projections):
            empty = {key for key, projection in projections.items() if not projection.kept}
            self._gone = {
                layer
                for layer in {key.layer for key in empty}
                if all(site.key in empty for site in self._sites if site.layer == layer)
            }
            for number, (batch, target) in enumerate(zip(self._batches, self._targets)):
                start = self._settled[number][first] if self._settled else self._embedded[number]
                hidden = self._through(batch, start, first, self._settled[number] if record else None)
                logits = self._logits(batch, hidden)
                target = target.to(logits.device, non_blocking=True)
                for part, probabilities in zip(logits.split(_at_once(logits)), target.split(_at_once(logits))):
                    terms = F.cross_entropy(part.float(), probabilities.float(), reduction="none")
                    total = total + precise_sum(terms)
        return float(total - self._entropy) / self._tokens

    def _logits(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        every = min(EVERY, hidden.shape[1])
        compared = slice(every - 1, None, every)
        logits, mask = self._runner.logits(batch, hidden[:, compared]), batch.attention_mask
        return logits.flatten(0, 1) if mask is None else logits[mask[:, compared].bool().to(logits.device)]

    def _through(
        self, batch: Batch, hidden: torch.Tensor, first: int, record: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """Run the layers from `first` on, and append their outputs to `record` if it is set."""
        for layer in range(first, self.layers):
            # A layer without sublayers returns the stream unchanged.
            if layer not in self._gone:
                hidden = self._runner.run(layer, batch, hidden)
                self.windows += len(batch.input_ids) / self.layers
            if record is not None:
                record.append(on_host(hidden))
        return hidden


def _at_once(logits: torch.Tensor) -> int:
    return max(1, LOGITS_AT_ONCE // logits.shape[-1])
