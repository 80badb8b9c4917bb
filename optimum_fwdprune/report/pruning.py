"""The report of a pruning: its figures as a table, and as a page with pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..allocation.composing import EARLIER
from ..allocation.losses import losses_by_kind, outside_units, rerouted
from ..evaluation import Comparison
from ..record.outcome import Outcome
from ..record.record import Record
from ..words import html_table, render_table
from .canvas import as_html
from .document import describe, document_of
from .page import write_page
from .pictures import plot_plan


KEPT_UNITS = "The share of its units that each layer kept"


@dataclass(frozen=True)
class PruningReport(Outcome):
    """The report of a pruning: the figures of [`Outcome`], and the record that they belong to.

    Args:
        record (`Record`, *optional*): the request, the plan, the scores, and how the model was trained.
    """

    record: Record | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, record: Record) -> PruningReport | None:
        """Return the report of a record; `None` where sizes are not known."""
        return None if record.outcome is None else cls(**{**vars(record.outcome), "record": record})

    @property
    def losses(self) -> list[str]:
        """A sentence per kind of units on the share of them that was removed, in the whole model and per layer."""
        plan = self.record.plan if self.record else None
        if plan is None:
            return []
        losses = list(losses_by_kind(plan.kept, plan.num_units, plan.attention_unit).values())
        return [*losses, *filter(None, [rerouted(plan)])]

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
            file (`str` or `Path`): file of the page, ending in .html.
            name (`str`, *optional*): name of the pruned model; by default that of the model it was made from.
            comparison (`Comparison`, *optional*): measurements, the dense model first and this one last.
            overwrite (`bool`, defaults to `False`): replace files that exist.

        Returns:
            `Path`: the JSON file.

        Raises:
            ValueError: where `file` does not end in .html.
            OSError: where a file exists, or cannot be written.
            ImportError: where matplotlib is not installed.
        """
        return write_page(document_of([self.document(name, comparison)]), file, overwrite=overwrite)

    def document(self, name: str | None = None, comparison: Comparison | None = None) -> dict[str, Any]:
        """Return all figures as JSON values, as the page shows them; the arguments are those of `save`."""
        record = replace(self.record or Record(), outcome=self)
        source = record.plan.metadata.get("source") if record.plan else None
        return describe(name or source or "pruned model", record, comparison)

    def __str__(self) -> str:
        return "\n".join([render_table(*self._table()), "", *self._sentences()]).rstrip()

    def _repr_html_(self) -> str:
        plan = self.record.plan if self.record else None
        sentences = "".join(f"<p>{html.escape(line)}</p>" for line in self._sentences())
        picture = "" if plan is None else as_html(lambda file: plot_plan(plan, file), KEPT_UNITS)
        return html_table(*self._table()) + sentences + picture

    def _sentences(self) -> list[str]:
        outside = outside_units(self.parameters_before, self.prunable_parameters)
        return [*filter(None, [outside]), *self.losses]

    def _table(self) -> tuple[Sequence[str], list[tuple[str, ...]]]:
        rows: list[tuple[str, ...]] = [
            ("Parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}", f"-{self.model_sparsity:.1%}"),
            (
                "Prunable parameters",
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
                    self.speedup.label.capitalize(),
                    f"requested {self.speedup.requested:.2f}",
                    f"predicted {self.speedup.predicted:.2f}",
                    self.speedup.measured_text,
                )
            )
        # A model that was pruned before is compared with its state before this pruning, and not with the dense model.
        again = self.record and self.record.plan and self.record.plan.metadata.get(EARLIER)
        return ("", "before" if again else "dense", "pruned", "change"), rows
