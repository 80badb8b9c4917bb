"""What pruning did, for people and for machines."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass

from .plan import PruningPlan


@dataclass(frozen=True)
class PruningReport:
    """Sizes before and after, and how the result was checked.

    Args:
        parameters_before, parameters_after (`int`): of the whole model, tied weights counted once.
        bytes_before, bytes_after (`int`): of its weights.
        prunable_parameters (`int`): owned by units before pruning.
        removed_parameters (`int`): of those, removed.
        requested_sparsity (`float`, *optional*): the fraction asked for; `None` where attention and MLP had
            budgets of their own.
        masked_difference (`float`): largest difference between the logits of the masked dense model and of the pruned
            model, as a fraction of the logits' scale.
        seconds (`dict[str, float]`): time spent, by stage.
        calibration (`str`, *optional*): what the scores were calibrated on.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    prunable_parameters: int
    removed_parameters: int
    requested_sparsity: float | None
    masked_difference: float
    seconds: dict[str, float]
    calibration: str | None

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
        return {**dataclasses.asdict(self), "sparsity": self.sparsity, "model_sparsity": self.model_sparsity}

    def __str__(self) -> str:
        rows = [
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
        return render_table(("", "dense", "pruned", "change"), rows)


def plan_table(plan: PruningPlan) -> str:
    """Return a table of what each layer kept."""
    layers = sorted({layer for layer, _ in plan.kept})
    rows = []
    for layer in layers:
        row = [str(layer)]
        for kind in ("attention", "mlp"):
            total = plan.num_units.get((layer, kind), 0)
            kept = len(plan.kept.get((layer, kind), ()))
            share = kept / total if total else 1.0
            row += [f"{kept} / {total}", f"{'█' * round(share * 20):<20} {share:4.0%}"]
        rows.append(tuple(row))
    unit = {"kv_group": "KV groups", "query_head": "query heads"}[plan.attention_unit]
    return render_table(("layer", unit, "", "MLP channels", ""), rows)


def render_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of text as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    output = io.StringIO()
    # A fixed width: the text is the same on a terminal, in a file and in a test.
    Console(file=output, width=110).print(table)
    return output.getvalue().rstrip("\n")
