"""What pruning did to the sizes of a model, and how the result was checked."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..allocation.composing import EARLIER
from ..allocation.plan import losses_by_kind
from ..architectures.site import SiteKey
from ..words import html_table, render_table


if TYPE_CHECKING:
    from ..checkpoint.record import Record
    from ..evaluation import Comparison


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
class PruningReport:
    """Sizes before and after, and how the result was checked.

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
        record (`Record`, *optional*): the request, the plan and the scores behind it.
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
    record: Record | None = field(default=None, repr=False, compare=False)

    @property
    def sparsity(self) -> float:
        """Removed fraction of the prunable parameters."""
        return self.removed_parameters / self.prunable_parameters

    @property
    def model_sparsity(self) -> float:
        """Removed fraction of the whole model, whose embeddings and norms stay."""
        return 1 - self.parameters_after / self.parameters_before

    @property
    def losses(self) -> list[str]:
        """A sentence for every kind of units: the share of them that was removed, in all and in each layer."""
        plan = self.record.plan if self.record else None
        if plan is None:
            return []
        return list(losses_by_kind(plan.kept, plan.num_units, plan.attention_unit).values())

    def to_dict(self) -> dict:
        """Return all figures as JSON values."""
        found = {name: getattr(self, name) for name in FIGURES}
        speedup = None if self.speedup is None else dataclasses.asdict(self.speedup)
        per_unit = {f"{layer}.{kind}": each for (layer, kind), each in self.unit_parameters.items()}
        shares = {"sparsity": self.sparsity, "model_sparsity": self.model_sparsity}
        return {**found, "speedup": speedup, **shares, "unit_parameters": per_unit}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], record: Record | None = None) -> PruningReport:
        """Build the report of what `to_dict` returned.

        Raises:
            ValueError: where a figure is missing.
        """
        try:
            speedup = None if values["speedup"] is None else Speedup(**values["speedup"])
            figures = {name: values[name] for name in FIGURES}
            named = [(name.split("."), each) for name, each in values["unit_parameters"].items()]
            per_unit = {(int(layer), kind): each for (layer, kind), each in named}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"These are not the figures of a pruning: {type(error).__name__}: {error}.") from error
        return cls(**figures, speedup=speedup, unit_parameters=per_unit, record=record)

    def save(
        self,
        file: str | Path,
        *,
        name: str | None = None,
        comparison: Comparison | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write a self-contained HTML page, and beside it a JSON file with the same figures.

        Args:
            file (`str` or `Path`): the page, ending in .html.
            name (`str`, *optional*): of the pruned model; by default what was pruned.
            comparison (`Comparison`, *optional*): what was measured, the dense model first and this one last.
            overwrite (`bool`, defaults to `False`): replace files that are there.

        Returns:
            `Path`: of the JSON file.

        Raises:
            ValueError: where `file` does not end in .html.
            OSError: where a file exists, or cannot be written.
            ImportError: where matplotlib is not installed.
        """
        from .document import describe, document_of
        from .page import write_page

        source = self.record.plan.metadata.get("source") if self.record and self.record.plan else None
        described = describe(name or source or "pruned model", self, self.record, comparison)
        return write_page(document_of([described]), file, overwrite=overwrite)

    def __str__(self) -> str:
        return "\n".join([render_table(*self._table()), "", *self.losses]).rstrip()

    def _repr_html_(self) -> str:
        return html_table(*self._table()) + "".join(f"<p>{html.escape(line)}</p>" for line in self.losses)

    def _table(self) -> tuple[Sequence[str], list[tuple[str, ...]]]:
        rows: list[tuple[str, ...]] = [
            ("Parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}", f"-{self.model_sparsity:.1%}"),
            (
                "of them prunable",
                f"{self.prunable_parameters:,}",
                f"{self.prunable_parameters - self.removed_parameters:,}",
                f"-{self.sparsity:.1%}",
            ),
            (
                "Weights, MB",
                f"{self.bytes_before / 1e6:,.1f}",
                f"{self.bytes_after / 1e6:,.1f}",
                f"-{1 - self.bytes_after / self.bytes_before:.1%}",
            ),
        ]
        if self.speedup is not None:
            rows.append(
                (
                    "Prefill, times as fast",
                    f"asked {self.speedup.requested:.2f}",
                    f"predicted {self.speedup.predicted:.2f}",
                    f"measured {self.speedup.measured:.2f}",
                )
            )
        # A model that was pruned before is compared with what it was then, and not with the dense one.
        again = self.record and self.record.plan and self.record.plan.metadata.get(EARLIER)
        return ("", "before" if again else "dense", "pruned", "change"), rows


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
