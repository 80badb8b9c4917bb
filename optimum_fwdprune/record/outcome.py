"""The figures of a pruning: sizes before and after, the check of the result, and times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from ..allocation.plan import PruningPlan
from ..architectures.site import SiteKey, keyed_by_site
from ..architectures.sizes import ModelSizes
from ..loading.subject import Sizes
from ..request.choices import UnitKind
from ..request.config import PruningConfig


if TYPE_CHECKING:
    from ..cutting.cut import Cut
    from ..planning.run import Run


@dataclass(frozen=True)
class Speedup:
    """Speed-ups that `target_speedup` refers to.

    Args:
        requested (`float`): the target.
        predicted (`float`): prediction from the latencies of single layers, which the plan is based on.
        measured (`float`, *optional*): measurement of the whole models, one after the other; `None` where the
            latencies are those of another program.
        of (`str`, defaults to `"prefill"`): what became faster: `"prefill"`, `"decode"` or shares of both.
    """

    requested: float
    predicted: float
    measured: float | None
    of: str = "prefill"

    @property
    def label(self) -> str:
        """What the speed-up is one of, for tables."""
        return {"prefill": "speed-up of the prefill", "decode": "speed-up of decoding"}.get(
            self.of, f"speed-up ({self.of})"
        )

    @property
    def measured_text(self) -> str:
        """The measured speed-up for tables."""
        return "not measured" if self.measured is None else f"measured {self.measured:.2f}"


@dataclass(frozen=True)
class Outcome:
    """Sizes before and after a pruning, the check of the result, and times.

    Args:
        parameters_before (`int`): parameters of the whole model before pruning, tied weights counted once.
        parameters_after (`int`): parameters after pruning.
        bytes_before (`int`): size of the weights before pruning.
        bytes_after (`int`): size of the weights after pruning.
        prunable_parameters (`int`): parameters that units owned before pruning.
        removed_parameters (`int`): how many of the prunable parameters were removed.
        requested_sparsity (`float`, *optional*): the requested sparsity; `None` where attention and MLP had budgets
            of their own.
        masked_difference (`float`, *optional*): largest difference between the logits of the masked dense model and of
            the pruned model, as a fraction of the logits' scale; `None` where a checkpoint has no record of it.
        seconds (`dict[str, float]`): time by stage; empty where a checkpoint has no record of it.
        calibration (`str`, *optional*): name of the calibration data.
        speedup (`Speedup`, *optional*): speed-ups, where `target_speedup` was set.
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
        """Removed fraction of all parameters, which include embeddings and norms."""
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
        """Build the figures from the JSON values that `to_dict` returned.

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


# Fields whose values are JSON values already.
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


def outcome_of(before: Sizes, done: Cut, run: Run, config: PruningConfig) -> Outcome:
    """Return the figures of a pruning; `before` are the sizes of the model before it."""
    after, speedup = ModelSizes.of(done.model), None
    if config.target_speedup is not None and run.speedup is not None:
        speedup = Speedup(config.target_speedup, *run.speedup, config.speed_of)
    return Outcome(
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        prunable_parameters=_prunable_by(before, done.plan),
        removed_parameters=sum(len(done.plan.removed(key)) * size for key, size in before.per_unit.items()),
        requested_sparsity=done.plan.metadata.get("requested_sparsity"),
        masked_difference=done.difference,
        seconds=run.clock.seconds,
        calibration=run.calibrated_on,
        speedup=speedup,
        unit_parameters=before.per_unit,
    )


def _prunable_by(before: Sizes, plan: PruningPlan) -> int:
    """Return the parameters that the share of removed parameters refers to: those of experts where a plan removes
    experts, and those of heads and channels where it removes these or nothing."""
    removed = {key.kind for key in plan.kept if plan.removed(key)}
    by_experts: dict[bool, int] = {True: 0, False: 0}
    for key, size in before.per_unit.items():
        by_experts[key.kind == UnitKind.EXPERT] += plan.num_units[key] * size
    if UnitKind.EXPERT not in removed:
        return by_experts[False]
    return by_experts[True] if removed == {UnitKind.EXPERT} else before.prunable
