"""Pictures of many models of one dense model: quality against size or speed, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .canvas import PALETTE, drawing, new_figure, save_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of series, in the order of their first points, and their markers where there are more series.
COLORS = ("accent", "attention", "mlp", "ink")
MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Point:
    """A model in a picture.

    Args:
        series (`str`): name of the series that it belongs to.
        label (`str`): its label.
        x, y (`float`): its place.
        on_front (`bool`): whether it is on the Pareto front.
    """

    series: str
    label: str
    x: float
    y: float
    on_front: bool


@dataclass(frozen=True)
class Panel:
    """One plot of a picture.

    Args:
        points (sequence of `Point`): the models.
        dense (`tuple[float, float]`): place of the dense model.
        horizontal, vertical (`str`): labels of the axes.
    """

    points: Sequence[Point]
    dense: tuple[float, float]
    horizontal: str
    vertical: str


def plot_fronts(panels: Sequence[Panel], file: str | Path) -> None:
    """Write a picture of panels side by side, at most two in a row, to a file (.svg, .png or .pdf).

    Raises:
        ValueError: where matplotlib has no format for the ending.
        ImportError: where matplotlib is not installed.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.2 * columns, 3.8 * rows)
    with drawing(**{"axes.grid.axis": "both"}):
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels):
            draw_front(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        save_figure(figure, file)


def draw_front(axis: Axes, panel: Panel) -> None:
    """Draw models as points, those on the Pareto front filled and joined by a line, and the dense model."""
    from matplotlib.ticker import MaxNLocator

    front = sorted((point.x, point.y) for point in panel.points if point.on_front)
    if len(front) > 1:
        axis.plot(*zip(*front), color=PALETTE["removed"], linewidth=1.4, zorder=1, label="Pareto front")
    series = list(dict.fromkeys(point.series for point in panel.points))
    for place, name in enumerate(series):
        color, marker = PALETTE[COLORS[place % len(COLORS)]], MARKERS[place // len(COLORS) % len(MARKERS)]
        points = [point for point in panel.points if point.series == name]
        for point in points:
            fill = color if point.on_front else PALETTE["paper"]
            axis.plot([point.x], [point.y], marker, markersize=7, color=color, markerfacecolor=fill, zorder=2)
            place_of_text: dict[str, Any] = {
                "xytext": (0, 7),
                "textcoords": "offset points",
                "ha": "center",
                "fontsize": 9,
            }
            axis.annotate(point.label, (point.x, point.y), color=PALETTE["ink"], **place_of_text)
        # An entry of the legend without a point.
        axis.plot([], [], marker, color=color, markersize=7, label=name)
    axis.plot(*([value] for value in panel.dense), "*", markersize=11, color=PALETTE["muted"], zorder=2, label="dense")
    values = [point.y for point in panel.points]
    if max(values) > 4 * panel.dense[1] > 0:
        axis.set_yscale("log")
    axis.margins(0.12)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axis.legend(frameon=False, fontsize=9)
    # The labels hold names of the user's texts, which matplotlib must not read as formulas.
    axis.set_xlabel(panel.horizontal, parse_math=False)
    axis.set_ylabel(panel.vertical, parse_math=False)
