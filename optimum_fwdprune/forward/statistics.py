"""Streaming statistics of the inputs of the output projections, gathered in plain forward passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Site, SiteKey
from ..data.calibration import Calibration
from ..loading.offloading import input_device
from ..runs import ranks
from ..runs.devices import compute_device, precise, precise_device
from ..runs.progress import progress
from ..runs.resume import Checkpoint


MOMENTS, GRAM, SOURCE_NORMS = "moments", "gram", "source_norms"
KINDS_OF_STATISTICS = (MOMENTS, GRAM, SOURCE_NORMS)


@dataclass
class SiteStatistics:
    """Statistics of one projection's input features over the calibration tokens.

    Args:
        count (`int`): tokens seen.
        mean (`Tensor[in_features]`, float32): mean of each feature.
        variance (`Tensor[in_features]`, float32): its population variance.
        gram (`Tensor[in_features, in_features]`, float32, *optional*): sum over tokens of x xᵀ.
        source_norms (`dict[str, Tensor[in_features]]`): ‖X_j‖₂ of what goes into each source linear, by the name of
            the linear, float32.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    gram: torch.Tensor | None = None
    source_norms: dict[str, torch.Tensor] = field(default_factory=dict)

    def with_more(self, other: SiteStatistics) -> SiteStatistics:
        """Return the statistics over the tokens of both, without Gram matrices."""
        count = self.count + other.count
        share = other.count / count
        mean = self.mean + share * (other.mean - self.mean)
        between = share * (1 - share) * (other.mean - self.mean).square()
        variance = (1 - share) * self.variance + share * other.variance + between
        norms = {name: torch.hypot(norm, other.source_norms[name]) for name, norm in self.source_norms.items()}
        return SiteStatistics(count, mean, variance, source_norms=norms)

    def to(self, device: torch.device) -> SiteStatistics:
        """Return the statistics on a device."""
        gram = None if self.gram is None else self.gram.to(device)
        norms = {name: norm.to(device) for name, norm in self.source_norms.items()}
        return SiteStatistics(self.count, self.mean.to(device), self.variance.to(device), gram, norms)

    @property
    def norm(self) -> torch.Tensor:
        """Root of the summed squares of each feature, Wanda's ‖X_j‖₂: `[in_features]`, float32."""
        return ((self.variance + self.mean.square()) * self.count).sqrt()


class PlacedStatistics(Mapping[SiteKey, SiteStatistics]):
    """Statistics of sites, handed out where each site computes, wherever they were gathered or read from.

    Args:
        sites (iterable of `Site`): sites of a model.
        statistics (mapping of site key to `SiteStatistics`): of these sites, or of some of them.
    """

    def __init__(self, sites: Iterable[Site], statistics: Mapping[SiteKey, SiteStatistics]):
        self._projections = {site.key: site.projection for site in sites}
        self._statistics = statistics

    def __getitem__(self, key: SiteKey) -> SiteStatistics:
        return self._statistics[key].to(compute_device(self._projections[key]))

    def __iter__(self) -> Iterator[SiteKey]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)


class _Accumulator:
    """Sums of deviations from the first batch's mean, whose squares do not cancel as raw ones would."""

    # Everything that stays is allocated beforehand: allocated between a layer's large temporary tensors, these vectors
    # would keep the allocator from using their memory for the next layer's, and the peak would grow layer by layer.
    def __init__(self, linear: nn.Linear, with_gram: bool):
        device = compute_device(linear)
        self.with_gram = with_gram
        self.count = 0
        self.gram: torch.Tensor | None = None
        self.shift = torch.zeros(linear.in_features, dtype=torch.float32, device=device)
        # Batches are summed in float32 and added up in float64: a vector per site, which costs nothing.
        self.sum = torch.zeros(linear.in_features, dtype=torch.float64, device=precise_device(device))
        self.squares = torch.zeros_like(self.sum)

    def add(self, inputs: torch.Tensor) -> None:
        """Add `inputs`, `[tokens, in_features]` in any float dtype."""
        values = inputs.float()
        if not len(values):
            return
        ones = values.new_ones(len(values))
        if self.count == 0:
            self.shift.copy_(values.mean(0))
            if self.with_gram:
                self.gram = values.new_zeros(values.shape[1], values.shape[1])
        if self.gram is not None:
            self.gram.addmm_(values.T, values)
        deviations = values - self.shift.to(values.device)
        self.sum += (ones @ deviations).to(self.sum.device)
        self.squares += torch.linalg.vecdot(deviations, deviations, dim=0).to(self.sum.device)
        self.count += len(values)

    def state(self) -> dict[str, torch.Tensor]:
        count = torch.tensor(self.count, device="cpu")
        found = {"count": count, "shift": self.shift, "sum": self.sum, "squares": self.squares}
        return found if self.gram is None else {**found, "gram": self.gram}

    def take_up(self, state: dict[str, torch.Tensor]) -> None:
        self.count = int(state["count"])
        for own, name in ((self.shift, "shift"), (self.sum, "sum"), (self.squares, "squares")):
            own.copy_(state[name])
        if self.with_gram and self.count:
            self.gram = state["gram"].to(self.shift.device)

    def pool(self) -> None:
        """Take in what the other processes have summed, around other shifts."""
        mean = precise(self.shift) + self.sum / max(1, self.count)
        squares = self.squares - self.sum.square() / max(1, self.count)
        counts, means, squares = ranks.gathered(
            torch.stack([torch.full_like(mean, self.count), mean, squares])
        ).unbind(1)
        self.count = int(counts[:, 0].sum())
        total = (counts / max(1, self.count) * means).sum(0)
        self.shift.copy_(total)
        deviation = total - precise(self.shift)
        self.sum = self.count * deviation
        self.squares = (squares + counts * (means - precise(self.shift)).square()).sum(0)
        if self.with_gram:
            gram = self.shift.new_zeros(2 * self.shift.shape) if self.gram is None else self.gram
            self.gram = ranks.summed(gram)

    def result(self) -> SiteStatistics:
        mean_deviation = self.sum / self.count
        variance = (self.squares / self.count - mean_deviation.square()).clamp_(min=0)
        mean, device = precise(self.shift) + mean_deviation, self.shift.device
        return SiteStatistics(self.count, mean.float().to(device), variance.float().to(device), self.gram)


class _SquareSums:
    """Sums of squares of each feature."""

    def __init__(self, linear: nn.Linear):
        self._device = compute_device(linear)
        self.squares = torch.zeros(linear.in_features, dtype=torch.float64, device=precise_device(self._device))

    def add(self, inputs: torch.Tensor) -> None:
        """Add `inputs`, `[tokens, in_features]` in any float dtype."""
        values = inputs.float()
        self.squares += torch.linalg.vecdot(values, values, dim=0).to(self.squares.device)

    def pool(self) -> None:
        """Take in what the other processes have summed."""
        self.squares = ranks.summed(self.squares)

    def norm(self) -> torch.Tensor:
        return self.squares.sqrt().float().to(self._device)


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel,
    sites: Iterable[Site],
    calibration: Calibration,
    batch_size: int,
    kinds: Iterable[str] = (MOMENTS,),
    checkpoint: Checkpoint | None = None,
) -> dict[SiteKey, SiteStatistics]:
    """Run the calibration tokens through `model` once and return the statistics of every site.

    With several processes each runs a share of the windows, and all return the statistics of all of them.

    Args:
        model (`PreTrainedModel`): the dense model; it is not changed.
        sites (iterable of `Site`): where to look.
        calibration (`Calibration`): the tokens; padding is left out of the statistics.
        batch_size (`int`): windows per forward pass.
        kinds (iterable of `str`): what to gather, of `KINDS_OF_STATISTICS`. Gram matrices take
            `in_features²` float32 numbers per site.
        checkpoint (`Checkpoint`, *optional*): where the sums so far are kept.

    Raises:
        ValueError: where a projection was bypassed, or saw a NaN or an infinity.
    """
    sites, kinds = list(sites), sorted(kinds)
    observer, device = Observer(sites, kinds), input_device(model)
    stage = (checkpoint or Checkpoint()).stage(*_name_of_pass(calibration, sites, kinds), own=True)
    share, done = calibration.own_share(), stage.load(observer.take_up) or 0
    with observer.watching():
        batches = list(share.after(done).batches(batch_size)) if share is not None and done < len(share) else []
        before = -(-done // batch_size)
        bar = progress(batches, "Calibrating", total=before + len(batches), unit="batch", initial=before)
        for input_ids, attention_mask in bar:
            observer.attention_mask = attention_mask
            # The base model stops before the vocabulary projection, which no site needs.
            model.base_model(
                input_ids=input_ids.to(device),
                attention_mask=None if attention_mask is None else attention_mask.to(device),
                use_cache=False,
            )
            done += len(input_ids)
            stage.save_now_and_then(lambda: (observer.sums(), {"windows": done}))  # noqa: B023  called at once
    observer.pool()
    return observer.statistics()


def _name_of_pass(calibration: Calibration, sites: list[Site], kinds: list[str]) -> tuple[str, Calibration]:
    """The stage of one pass over some tokens: a run may make several."""
    about = json.dumps([calibration.fingerprint, [site.key for site in sites], kinds])
    return f"statistics-{hashlib.sha256(about.encode()).hexdigest()[:12]}", calibration


class Observer:
    """Watches the sites of a model, or of some of its layers, while it runs.

    Args:
        sites (iterable of `Site`): where to look.
        kinds (iterable of `str`): what to gather, of `KINDS_OF_STATISTICS`.

    Attributes:
        attention_mask (`Tensor[windows, tokens]`, *optional*): of the batch that runs next; 0 where a token is
            padding.
    """

    def __init__(self, sites: Iterable[Site], kinds: Iterable[str]):
        self._sites, kinds = list(sites), set(kinds)
        self._accumulators = {site.key: _Accumulator(site.projection, GRAM in kinds) for site in self._sites}
        self._sources = {
            coupling.name: (coupling.linear, _SquareSums(coupling.linear))
            for site in self._sites
            for coupling in site.couplings
            if SOURCE_NORMS in kinds and coupling.axis == 0
        }
        self.attention_mask: torch.Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Gather while the context is open."""
        watched = [(site.projection, self._adds_to(self._accumulators[site.key])) for site in self._sites]
        watched += [(linear, self._adds_to(squares)) for linear, squares in self._sources.values()]
        with _pre_hooks(watched):
            yield

    def _adds_to(self, sums: _Accumulator | _SquareSums):
        def hook(_module, args):
            inputs = args[0].flatten(0, -2)
            if self.attention_mask is not None:
                inputs = inputs[self.attention_mask.bool().flatten().to(inputs.device)]
            sums.add(inputs)

        return hook

    def sums(self) -> dict[str, torch.Tensor]:
        """Return what was gathered so far, for [`take_up`]."""
        found = {f"squares.{name}": squares.squares for name, (_, squares) in self._sources.items()}
        for (layer, kind), accumulator in self._accumulators.items():
            found |= {f"{layer}.{kind}.{name}": value for name, value in accumulator.state().items()}
        return found

    def take_up(self, sums: dict[str, torch.Tensor], numbers: dict[str, Any]) -> int:
        """Go on from `sums` that were gathered before, and return over how many windows, which `numbers` say."""
        for name, (_, squares) in self._sources.items():
            squares.squares.copy_(sums[f"squares.{name}"])
        for (layer, kind), accumulator in self._accumulators.items():
            prefix = f"{layer}.{kind}."
            own = {name.removeprefix(prefix): value for name, value in sums.items() if name.startswith(prefix)}
            accumulator.take_up(own)
        return numbers["windows"]

    def pool(self) -> None:
        """Put together what the processes of a run have gathered, each on windows of its own."""
        if ranks.world_size() > 1:
            for accumulator in self._accumulators.values():
                accumulator.pool()
            for _, squares in self._sources.values():
                squares.pool()

    def statistics(self) -> dict[SiteKey, SiteStatistics]:
        """Return what was gathered.

        Raises:
            ValueError: where a projection was bypassed, or saw a NaN or an infinity.
        """
        found = {}
        for site in self._sites:
            check_called(site, self._accumulators[site.key].count)
            result = self._accumulators[site.key].result()
            if not (result.mean.isfinite().all() and result.variance.isfinite().all()):
                raise ValueError(
                    f"The activations before {site.projection_name} ({site}) contain NaN or infinity. Check the "
                    f"weights up to this layer; a float16 model that overflows runs in bfloat16 or float32."
                )
            names = [coupling.name for coupling in site.couplings if coupling.name in self._sources]
            result.source_norms = {name: self._sources[name][1].norm() for name in names}
            found[site.key] = result
        return found


@contextmanager
def _pre_hooks(pairs: Iterable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_called(site: Site, calls: int) -> None:
    """Raise `ValueError` where forward passes made no calls of the projection of `site`."""
    if calls == 0:
        raise ValueError(
            f"The forward pass never called {site.projection_name}, so the {site} cannot be measured or cut. A fused "
            f"or slow-but-exact attention path may bypass it; load the model with its plain implementation."
        )
