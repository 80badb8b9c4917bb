"""What all pictures share: colours, figures, legends and axes, and how they are written to files."""

from __future__ import annotations

import base64
import html
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colour of every part of a picture. The page turns them into custom properties, which its dark theme replaces.
PALETTE = {
    "ink": "#1d2433",
    "muted": "#5f6b7d",
    "grid": "#dfe3ea",
    "track": "#e6e9ef",
    "attention": "#3a6fd8",
    "mlp": "#d5742b",
    "expert": "#8a4fbf",
    "removed": "#a9b2c0",
    "accent": "#12866f",
    "paper": "#fefefe",
}

NO_MATPLOTLIB = "Plots need matplotlib: pip install optimum-fwdprune[plots]."


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, whose `width` and `height` are in inches.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(NO_MATPLOTLIB) from error
    return Figure(figsize=(width, height), layout="constrained")


def drawing(**more: Any):
    """Return a context in which matplotlib draws in the colours of `PALETTE`; `more` are further settings of it."""
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
        ValueError: where matplotlib has no format for the file's ending.
    """
    file = Path(file)
    endings = figure.canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in endings:
        raise ValueError(f"{file} must end in one of {', '.join(sorted(endings))}, which determines the format.")
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        figure.savefig(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def as_html(draw: Callable[[Path], None], description: str) -> str:
    """Return a picture as HTML that notebooks show; empty where matplotlib is not installed.

    Args:
        draw (`Callable`): writes the picture to the file that it is called with.
        description (`str`): what the picture shows, for readers who do not see it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.svg"
        draw(file)
        content = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{content}">'


def add_legend(axis: Axes) -> None:
    """Add a legend above the plot, right of the title, where it covers nothing."""
    axis.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=6, frameon=False, columnspacing=1.2)


def number_layers(axis: Axes, layers: Sequence[int]) -> None:
    """Label the horizontal axis with layer numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if layers:
        axis.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
