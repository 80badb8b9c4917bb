"""Streaming statistics of the inputs of the output projections, gathered in plain forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .architectures import Site, SiteKey
from .calibration import Calibration
from .utils import progress


MOMENTS, GRAM = "moments", "gram"
KINDS_OF_STATISTICS = (MOMENTS, GRAM)


@dataclass
class SiteStatistics:
    """Statistics of one projection's input features over the calibration tokens.

    Args:
        count (`int`): tokens seen.
        mean (`Tensor[in_features]`, float32): mean of each feature.
        variance (`Tensor[in_features]`, float32): its population variance.
        gram (`Tensor[in_features, in_features]`, float32, *optional*): sum over tokens of x xᵀ.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    gram: torch.Tensor | None = None

    @property
    def norm(self) -> torch.Tensor:
        """Root of the summed squares of each feature, Wanda's ‖X_j‖₂: `[in_features]`, float32."""
        return ((self.variance + self.mean.square()) * self.count).sqrt()


class _Accumulator:
    """Sums of deviations from the first batch's mean, whose squares do not cancel as raw ones would."""

    def __init__(self, with_gram: bool):
        self.with_gram = with_gram
        self.count = 0
        self.gram: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Add `inputs`, `[tokens, in_features]` in any float dtype."""
        values = inputs.float()
        ones = values.new_ones(len(values))
        if self.count == 0:
            self.shift = values.mean(0)
            # Batches are summed in float32 and added up in float64: a vector per site, which costs nothing.
            self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
            self.squares = torch.zeros_like(self.sum)
            if self.with_gram:
                self.gram = values.new_zeros(values.shape[1], values.shape[1])
        if self.gram is not None:
            self.gram.addmm_(values.T, values)
        deviations = values - self.shift
        self.sum += ones @ deviations
        self.squares += torch.linalg.vecdot(deviations, deviations, dim=0)
        self.count += len(values)

    def result(self) -> SiteStatistics:
        mean_deviation = self.sum / self.count
        variance = (self.squares / self.count - mean_deviation.square()).clamp_(min=0)
        mean = self.shift + mean_deviation
        return SiteStatistics(self.count, mean.float(), variance.float(), self.gram)


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel,
    sites: Iterable[Site],
    calibration: Calibration,
    batch_size: int,
    kinds: Iterable[str] = (MOMENTS,),
) -> dict[SiteKey, SiteStatistics]:
    """Run the calibration tokens through `model` once and return the statistics of every site.

    Args:
        model (`PreTrainedModel`): the dense model; it is not changed.
        sites (iterable of `Site`): where to look.
        calibration (`Calibration`): the tokens; padding is left out of the statistics.
        batch_size (`int`): windows per forward pass.
        kinds (iterable of `str`): what to gather, of `KINDS_OF_STATISTICS`. Gram matrices take
            `in_features²` float32 numbers per site.

    Raises:
        ValueError: where a projection was bypassed, or saw a NaN or an infinity.
    """
    sites = list(sites)
    accumulators = {site.key: _Accumulator(GRAM in set(kinds)) for site in sites}
    mask: torch.Tensor | None = None

    def watch(site: Site):
        accumulator = accumulators[site.key]

        def hook(_module, args):
            inputs = args[0].flatten(0, -2)
            accumulator.add(inputs if mask is None else inputs[mask.to(inputs.device)])

        return hook

    with _pre_hooks((site.projection, watch(site)) for site in sites):
        batches = list(calibration.batches(batch_size))
        for input_ids, attention_mask in progress(batches, "Calibrating", unit="batch"):
            mask = None if attention_mask is None else attention_mask.bool().flatten()
            # The base model stops before the vocabulary projection, which no site needs.
            model.base_model(
                input_ids=input_ids.to(model.device),
                attention_mask=None if attention_mask is None else attention_mask.to(model.device),
                use_cache=False,
            )

    statistics = {}
    for site in sites:
        if accumulators[site.key].count == 0:
            raise ValueError(
                f"The forward pass never called {site.projection_name}, so the {site} cannot be measured or cut. A "
                f"fused or slow-but-exact attention path may bypass it; load the model with its plain implementation."
            )
        result = accumulators[site.key].result()
        if not (result.mean.isfinite().all() and result.variance.isfinite().all()):
            raise ValueError(
                f"The activations before {site.projection_name} ({site}) contain NaN or infinity. Check the weights "
                f"up to this layer; a float16 model that overflows runs in bfloat16 or float32."
            )
        statistics[site.key] = result
    return statistics


@contextmanager
def _pre_hooks(pairs: Iterable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
