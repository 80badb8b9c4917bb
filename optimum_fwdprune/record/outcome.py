"""What pruning did to the sizes of a model, as figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ..architectures.site import SiteKey, keyed_by_site


@dataclass(frozen=True)
class Speedup:
    """How many times as fast the pruned model is at the prefill that `target_speedup` was for.

    Args:
        requested (`float`): the target.
        predicted (`float`): by the latencies of single layers that the plan was made with.
        measured (`float`): of the whole models, one after the other.
    """

    requested: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Outcome:
    """Sizes before and after, how the result was checked, and how long it took.

    Args:
        parameters_before (`int`): of the whole model, tied weights counted once.
        parameters_after (`int`): likewise.
        bytes_before (`int`): of its weights.
        bytes_after (`int`): likewise.
        prunable_parameters (`int`): owned by units before pruning.
        removed_parameters (`int`): of those, removed.
        requested_sparsity (`float`, *optional*): the fraction asked for; `None` where attention and MLP had
            budgets of their own.
        masked_difference (`float`, *optional*): largest difference between the logits of the masked dense model and of
            the pruned model, as a fraction of the logits' scale; `None` where a checkpoint does not tell.
        seconds (`dict[str, float]`): time spent, by stage; empty where a checkpoint does not tell.
        calibration (`str`, *optional*): what the scores were calibrated on.
        speedup (`Speedup`, *optional*): where a speed-up was asked for.
        unit_parameters (`dict[tuple[int, str], int]`): parameters that one unit of a site owns in the dense model.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    prunable_parameters: int
    removed_parameters: int
    requested_sparsity: float | None
    masked_difference: float | None
    seconds: dict[str, float]
    calibration: str | None
    speedup: Speedup | None = None
    unit_parameters: dict[SiteKey, int] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "unit_parameters", keyed_by_site(self.unit_parameters))

    @property
    def sparsity(self) -> float:
        """Removed fraction of the prunable parameters."""
        return self.removed_parameters / self.prunable_parameters

    @property
    def model_sparsity(self) -> float:
        """Removed fraction of the whole model, whose embeddings and norms stay."""
        return 1 - self.parameters_after / self.parameters_before

    def to_dict(self) -> dict:
        """Return all figures as JSON values."""
        figures = {name: getattr(self, name) for name in FIGURES}
        speedup = None if self.speedup is None else dataclasses.asdict(self.speedup)
        per_unit = {str(key): parameters for key, parameters in self.unit_parameters.items()}
        shares = {"sparsity": self.sparsity, "model_sparsity": self.model_sparsity}
        return {**figures, "speedup": speedup, **shares, "unit_parameters": per_unit}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build it from the JSON values that `to_dict` returned.

        Raises:
            ValueError: where a figure is missing.
        """
        try:
            speedup = None if values["speedup"] is None else Speedup(**values["speedup"])
            figures = {name: values[name] for name in FIGURES}
            per_unit = {SiteKey.parse(name): parameters for name, parameters in values["unit_parameters"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"These are not the figures of a pruning: {type(error).__name__}: {error}.") from error
        return cls(**figures, speedup=speedup, unit_parameters=per_unit)


# Fields of a report that are JSON values as they are.
FIGURES = (
    "parameters_before",
    "parameters_after",
    "bytes_before",
    "bytes_after",
    "prunable_parameters",
    "removed_parameters",
    "requested_sparsity",
    "masked_difference",
    "seconds",
    "calibration",
)
