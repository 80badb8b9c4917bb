"""Running sums over the inputs of a linear, from which statistics are computed."""

from __future__ import annotations

import torch
from torch import nn

from ..runs import ranks
from ..runs.devices import compute_device, precise, precise_device
from .products import add_products, mirror
from .statistics import SiteStatistics


class Accumulator:
    """Sums of deviations from the mean of the first batch, whose squares do not suffer from cancellation."""

    # The vectors are allocated in advance. If they were allocated between the large temporary tensors of a layer, the
    # memory would be fragmented, and the peak would grow layer by layer.
    def __init__(self, features: int, device: torch.device, with_gram: bool = False):
        self.with_gram = with_gram
        self.count = 0
        self.gram: torch.Tensor | None = None
        self.shift = torch.zeros(features, dtype=torch.float32, device=device)
        # Batches are summed in float32, and their sums in float64, which is cheap for a vector per site.
        self.sum = torch.zeros(features, dtype=torch.float64, device=precise_device(device))
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
            add_products(self.gram, values, in_bfloat16=inputs.dtype == torch.bfloat16)
        deviations = values - self.shift.to(values.device)
        self.sum += (ones @ deviations).to(self.sum.device)
        self.squares += torch.linalg.vecdot(deviations, deviations, dim=0).to(self.sum.device)
        self.count += len(values)

    def state(self) -> dict[str, torch.Tensor]:
        count = torch.tensor(self.count, device="cpu")
        state = {"count": count, "shift": self.shift, "sum": self.sum, "squares": self.squares}
        return state if self.gram is None else {**state, "gram": self.gram}

    def take_up(self, state: dict[str, torch.Tensor]) -> None:
        self.count = int(state["count"])
        for own, name in ((self.shift, "shift"), (self.sum, "sum"), (self.squares, "squares")):
            own.copy_(state[name])
        if self.with_gram and self.count:
            self.gram = state["gram"].to(self.shift.device)

    def pool(self) -> None:
        """Combine the sums with those of the other processes, which are around other shifts."""
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
        gram = None if self.gram is None else mirror(self.gram)
        return SiteStatistics(self.count, mean.float().to(device), variance.float().to(device), gram)


class SquareSums:
    """Sums of squares of every feature."""

    def __init__(self, linear: nn.Linear):
        self._device = compute_device(linear)
        self.squares = torch.zeros(linear.in_features, dtype=torch.float64, device=precise_device(self._device))

    def add(self, inputs: torch.Tensor) -> None:
        """Add `inputs`, `[tokens, in_features]` in any float dtype."""
        values = inputs.float()
        self.squares += torch.linalg.vecdot(values, values, dim=0).to(self.squares.device)

    def pool(self) -> None:
        """Add the sums of the other processes."""
        self.squares = ranks.summed(self.squares)

    def norm(self) -> torch.Tensor:
        return self.squares.sqrt().float().to(self._device)
