"""Colours, figures, legends and axes that all pictures share, and the file that a picture is written to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Every colour by its part; the page turns them into custom properties, which its dark theme replaces.
PALETTE = {
    "ink": "#1d2433",
    "muted": "#5f6b7d",
    "grid": "#dfe3ea",
    "track": "#e6e9ef",
    "attention": "#3a6fd8",
    "mlp": "#d5742b",
    "removed": "#a9b2c0",
    "accent": "#12866f",
    "paper": "#fefefe",
}

NO_MATPLOTLIB = "Plots need matplotlib: pip install optimum-fwdprune[plots]."


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(NO_MATPLOTLIB) from error
    return Figure(figsize=(width, height), layout="constrained")


def drawing(**more: Any):
    """Return a context in which matplotlib draws in our colours."""
    import matplotlib

    style: dict[Any, Any] = {
        "axes.edgecolor": PALETTE["grid"],
        "axes.labelcolor": PALETTE["muted"],
        "axes.titlecolor": PALETTE["ink"],
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.labelsize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": PALETTE["grid"],
        "font.size": 10.5,
        "legend.fontsize": 10.5,
        "legend.labelcolor": PALETTE["ink"],
        "legend.handlelength": 1.2,
        "text.color": PALETTE["ink"],
        "xtick.color": PALETTE["muted"],
        "ytick.color": PALETTE["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    }
    return matplotlib.rc_context(style | more)


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure to a file that appears whole or not at all.

    Raises:
        ValueError: where matplotlib does not know the file's ending.
    """
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


def add_legend(axis: Axes) -> None:
    """Put a legend above the picture, where it covers nothing, right of the title."""
    axis.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=6, frameon=False, columnspacing=1.2)


def number_layers(axis: Axes, layers: Sequence[int]) -> None:
    """Number the horizontal axis by layers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if layers:
        axis.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
