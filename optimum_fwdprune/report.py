"""What pruning did, for people and for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .plan import PruningPlan
from .utils import render_table


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


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
        speedup (`Speedup`, *optional*): where a speed-up was asked for.
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
    speedup: Speedup | None = None

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
        if self.speedup is not None:
            rows.append(
                (
                    "Prefill, times as fast",
                    f"asked {self.speedup.requested:.2f}",
                    f"predicted {self.speedup.predicted:.2f}",
                    f"measured {self.speedup.measured:.2f}",
                )
            )
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
    return render_table(("layer", _unit_name(plan), "", "MLP channels", ""), rows)


def _unit_name(plan: PruningPlan) -> str:
    return {"kv_group": "KV groups", "query_head": "query heads"}[plan.attention_unit]


def plot_plan(plan: PruningPlan, file: str | Path) -> None:
    """Draw what each layer kept, as a share, into a file (.svg, .png or .pdf)."""
    from matplotlib.figure import Figure

    layers = sorted({layer for layer, _ in plan.kept})
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axis = figure.subplots()
    for place, (kind, label) in enumerate((("attention", _unit_name(plan)), ("mlp", "MLP channels"))):
        shares = [len(plan.kept.get((layer, kind), ())) / plan.num_units.get((layer, kind), 1) for layer in layers]
        axis.bar([layer + 0.4 * place - 0.2 for layer in layers], shares, width=0.4, label=label)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_xlabel("layer")
    axis.set_ylabel("kept")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    _save_figure(figure, file)


def history_table(history: Mapping[str, Tensor], rows: int = 10) -> str:
    """Return a table of what happened while masks were learned, in `rows` stretches of equally many steps.

    Args:
        history (mapping of `str` to `Tensor[steps]`): of [`Scores`].
        rows (`int`, defaults to 10): at most so many.

    Raises:
        ValueError: where there is no history, because the method does not learn, or took no step.
    """
    steps = _steps_of(history)
    of_kind = {
        kind: [values for name, values in history.items() if name.startswith("keep_rate.") and name.endswith(kind)]
        for kind in ("attention", "mlp")
    }
    stretch = -(-steps // rows)
    lines = []
    for first in range(0, steps, stretch):
        last = min(first + stretch, steps) - 1
        rates = []
        for values in of_kind.values():
            now = [float(rate[last]) for rate in values]
            rates.append(f"{min(now):.2f} to {max(now):.2f}" if now else "")
        lines.append(
            (
                f"{first + 1} to {last + 1}",
                f"{float(history['loss'][first : last + 1].nanmean()):.3f}",
                f"{float(history['entropy'][last]):.3f}",
                f"{float(history['expected_sparsity'][last]):.1%}",
                *rates,
            )
        )
    header = ("steps", "expected loss", "entropy, bits", "sparsity", "kept heads per layer", "kept channels per layer")
    return render_table(header, lines)


def plot_history(history: Mapping[str, Tensor], file: str | Path) -> None:
    """Draw the expected loss, the entropy of the masks, and the keep rate of every layer over the steps.

    Args:
        history (mapping of `str` to `Tensor[steps]`): of [`Scores`].
        file (`str` or `Path`): picture to write; its ending (.svg, .png, .pdf) says which format.

    Raises:
        ValueError: where there is no history, or matplotlib does not know the ending.
        ImportError: where matplotlib is not installed.
    """
    steps = _steps_of(history)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install optimum-fwdprune[plots].") from error

    figure = Figure(figsize=(10, 7), layout="constrained")
    (losses, entropies), heatmaps = figure.subplots(2, 2, sharex=True)
    span = range(1, steps + 1)
    loss = history["loss"].double()
    losses.plot(span, loss, color="0.75", linewidth=1, label="each step")
    window = max(1, steps // 20)
    smooth = [float(loss[max(0, step - window) : step].nanmean()) for step in span]
    losses.plot(span, smooth, label=f"mean of {window} steps")
    losses.set_ylabel("expected loss, nats per token")
    losses.legend()
    entropies.plot(span, history["entropy"])
    entropies.set_ylabel("entropy of the masks, bits per unit")
    entropies.set_ylim(0, 1)
    for axis, (kind, label) in zip(heatmaps, (("attention", "heads"), ("mlp", "MLP channels"))):
        rates = {
            int(name.split(".")[1]): values
            for name, values in history.items()
            if name.startswith("keep_rate.") and name.endswith(kind)
        }
        axis.set_title(f"keep rate of {label}")
        axis.set_xlabel("step")
        if not rates:
            axis.text(0.5, 0.5, "not pruned", ha="center", va="center", transform=axis.transAxes)
            continue
        # Layers that the request leaves alone stay blank.
        missing = loss.new_full((steps,), float("nan"))
        rows = [rates.get(layer, missing).tolist() for layer in range(max(rates) + 1)]
        extent = (0.5, steps + 0.5, max(rates) + 0.5, -0.5)
        image = axis.imshow(rows, aspect="auto", extent=extent, vmin=0, vmax=1, cmap="viridis", interpolation="none")
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis)
    _save_figure(figure, file)


def _save_figure(figure: Figure, file: str | Path) -> None:
    file = Path(file)
    endings = figure.canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in endings:
        raise ValueError(f"{file} must end in one of {', '.join(sorted(endings))}; it says which format to write.")
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        figure.savefig(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _steps_of(history: Mapping[str, Tensor]) -> int:
    steps = len(history["loss"]) if "loss" in history else 0
    if not steps:
        raise ValueError("There is no history of learning: the method does not learn, or took no step.")
    return steps
