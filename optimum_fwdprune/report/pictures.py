"""Pictures of plans, scores and learning: one set of drawings for model cards, files and the report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..allocation.plan import PruningPlan
from ..architectures.site import SiteKey, unit_name
from ..request.choices import WIDTH_KINDS, DepthKind, UnitKind
from .canvas import PALETTE, add_legend, drawing, new_figure, number_layers, save_figure
from .learning import learning_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


def plot_plan(plan: PruningPlan, file: str | Path) -> None:
    """Write a picture of the share of its units that each layer kept to a file (.svg, .png or .pdf)."""
    layers, kinds = sorted({layer for layer, _ in plan.kept}), plan.kinds
    figure = new_figure(8, 1.9 * len(kinds))
    with drawing():
        for axis, kind in zip(figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0], kinds):
            keys = [SiteKey(layer, kind) for layer in layers]
            kept = [len(plan.kept.get(key, [])) for key in keys]
            units = [plan.num_units.get(key, 0) for key in keys]
            draw_kept(axis, kind, layers, kept, units, unit_name(kind, plan.attention_unit))
        axis.set_xlabel("layer")
        save_figure(figure, file)


def plot_history(history: Mapping[str, Tensor], file: str | Path) -> None:
    """Write a picture of the expected loss, the entropy of the masks, and every layer's keep rate over the steps.

    Args:
        history (mapping of `str` to `Tensor[steps]`): the history of [`Scores`].
        file (`str` or `Path`): picture to write; its ending (.svg, .png, .pdf) determines the format.

    Raises:
        ValueError: where there is no history, or matplotlib has no format for the ending.
        ImportError: where matplotlib is not installed.
    """
    learning = learning_of(history)
    figure = new_figure(10, 7)
    with drawing():
        (losses, masks), rates = figure.subplots(2, 2, sharex=True)
        draw_loss(losses, learning)
        draw_masks(masks, learning)
        for axis, kind in zip(rates, WIDTH_KINDS):
            draw_rates(axis, kind, learning)
            axis.set_xlabel("step")
        save_figure(figure, file)


def draw_kept(
    axis: Axes, kind: str, layers: Sequence[int], kept: Sequence[int], units: Sequence[int], name: str
) -> None:
    """Draw a bar per layer: the share of its units that were kept, on a bar of full height, which is hatched where no
    unit was kept."""
    present = [place for place, total in enumerate(units) if total and kept[place]]
    where = [layers[place] for place in present]
    axis.bar(where, [1.0] * len(where), width=0.74, color=PALETTE["track"])
    axis.bar(where, [kept[place] / units[place] for place in present], width=0.74, color=PALETTE[kind])
    if gone := [layers[place] for place, total in enumerate(units) if total and not kept[place]]:
        axis.bar(gone, [1.0] * len(gone), width=0.7, label=f"no {kind_name(kind)}", **_hatched())
        add_legend(axis)
    axis.set_title(f"{name}, {sum(kept):,} of {sum(units):,} kept")
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    number_layers(axis, layers)


def draw_parameters(
    axis: Axes, layers: Sequence[int], before: Sequence[int], after: Mapping[str, Sequence[int]]
) -> None:
    """Draw the prunable parameters of every layer in millions: those left, by kind, on a bar of those before pruning.

    Args:
        axis (`Axes`): axes to draw on.
        layers (sequence of `int`): numbers of the layers.
        before (sequence of `int`): parameters of all kinds together before pruning.
        after (mapping of kind to sequence of `int`): parameters of each kind after pruning, attention first.
    """
    axis.bar(layers, [count / 1e6 for count in before], width=0.74, color=PALETTE["track"], label="removed")
    floor = [0.0] * len(layers)
    for kind in reversed(list(after)):
        label = kind_name(kind)
        height = [count / 1e6 for count in after[kind]]
        axis.bar(layers, height, width=0.74, bottom=floor, color=PALETTE[kind], label=label)
        floor = [low + more for low, more in zip(floor, height)]
    axis.set_ylabel("parameters, millions")
    add_legend(axis)
    number_layers(axis, layers)


def draw_histogram(axis: Axes, kind: str, spread: Mapping[str, Any], name: str) -> None:
    """Draw a histogram of the units' scores, with the bars of kept units on top of those of removed ones.

    Args:
        axis (`Axes`): axes to draw on.
        kind (`str`): kind of the units.
        spread (mapping): `edges`, `is_log` and counts of `kept` and `removed`, or of `all`.
        name (`str`): name of the units, which becomes the title.
    """
    edges = spread["edges"]
    widths = [high - low for low, high in pairwise(edges)]
    floor = [0] * len(widths)
    for part, color in (("removed", PALETTE["removed"]), ("kept", PALETTE[kind]), ("all", PALETTE[kind])):
        if any(spread.get(part, ())):
            axis.bar(edges[:-1], spread[part], widths, bottom=floor, align="edge", color=color, label=part)
            floor = [low + more for low, more in zip(floor, spread[part])]
    if spread["is_log"]:
        axis.set_xscale("log")
    axis.set_title(name)
    axis.set_ylabel("units")
    add_legend(axis)


def draw_spread_by_layer(axis: Axes, kind: str, rows: Sequence[Mapping[str, float]], is_log: bool, name: str) -> None:
    """Draw the scores of each layer's units: their median as a line, half and nine tenths of them as bands.

    Args:
        axis (`Axes`): axes to draw on.
        kind (`str`): kind of the units.
        rows (sequence of mappings): `layer`, and the quantiles `q05`, `q25`, `q50`, `q75` and `q95`.
        is_log (`bool`): whether the axis of the scores is logarithmic.
        name (`str`): name of the units, which becomes the title.
    """
    layers = [int(row["layer"]) for row in rows]
    column = {name: [row[name] for row in rows] for name in ("q05", "q25", "q50", "q75", "q95")}
    axis.fill_between(layers, column["q05"], column["q95"], color=PALETTE[kind], alpha=0.18, linewidth=0)
    axis.fill_between(layers, column["q25"], column["q75"], color=PALETTE[kind], alpha=0.32, linewidth=0)
    axis.plot(layers, column["q50"], color=PALETTE[kind], linewidth=1.8)
    if is_log:
        axis.set_yscale("log")
    axis.set_title(name)
    axis.set_ylabel("score")
    number_layers(axis, layers)


def draw_depth_scores(axis: Axes, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a bar per layer: the score of the layer, or of its attention or MLP, hatched where it was removed.

    Args:
        axis (`Axes`): axes to draw on.
        kind (`str`): `"layer"`, or the kind of the sublayers.
        rows (sequence of mappings): `layer`, `score`, and `removed`.
    """
    name = "layer" if kind == DepthKind.LAYER else kind_name(kind)
    color = PALETTE["accent" if kind == DepthKind.LAYER else kind]
    left, gone = ([row for row in rows if bool(row["removed"]) == removed] for removed in (False, True))
    axis.bar([row["layer"] for row in left], [row["score"] for row in left], width=0.74, color=color)
    if gone:
        scores = [row["score"] for row in gone]
        axis.bar([row["layer"] for row in gone], scores, width=0.7, label=f"removed {name}", **_hatched())
        add_legend(axis)
    axis.set_title(f"score of the {name}")
    axis.set_ylabel("score")
    number_layers(axis, [int(row["layer"]) for row in rows])


def _hatched() -> dict[str, Any]:
    """Return how bars of what was removed are drawn."""
    return {"facecolor": "none", "edgecolor": PALETTE["removed"], "linewidth": 0.8, "hatch": "/////"}


def draw_loss(axis: Axes, learning: Mapping[str, Any]) -> None:
    """Draw the loss over the steps, as it is or as means of stretches, and smoothed."""
    for name, over, color, width in (
        ("loss", learning["stretch"], "removed", 1.0),
        ("smooth_loss", learning["smoothed_over"], "accent", 1.8),
    ):
        label = "each step" if over == 1 else f"mean of {over}"
        axis.plot(learning["steps"], _floats(learning[name]), color=PALETTE[color], linewidth=width, label=label)
    name = "divergence from dense" if learning.get("is_search") else "expected loss"
    axis.set_ylabel(f"{name}, nats per token")
    if learning["smoothed_over"] > 1:
        add_legend(axis)


def draw_masks(axis: Axes, learning: Mapping[str, Any]) -> None:
    """Draw the entropy of the masks, and the share of units that they remove."""
    for name, label, color, style in (
        ("entropy", "entropy, bits", "accent", "-"),
        ("expected_sparsity", "removed share", "muted", "--"),
    ):
        if learning[name]:
            axis.plot(learning["steps"], learning[name], style, color=PALETTE[color], linewidth=1.8, label=label)
            add_legend(axis)
    axis.set_ylim(0, 1)
    axis.set_ylabel("of the masks, per unit")


def draw_rates(axis: Axes, kind: str, learning: Mapping[str, Any]) -> None:
    """Draw the keep rate of every layer over the steps as a heat map; layers without a keep rate stay blank."""
    from matplotlib.ticker import MaxNLocator

    rates = {int(layer): values for layer, values in learning["keep_rates"][kind].items()}
    steps = learning["steps"]
    axis.set_title(f"keep rate, {kind_name(kind)}")
    if not rates:
        axis.text(0.5, 0.5, "not pruned", ha="center", va="center", transform=axis.transAxes, color=PALETTE["muted"])
        return
    blank = [float("nan")] * len(steps)
    rows = [rates.get(layer, blank) for layer in range(max(rates) + 1)]
    extent = (0.5, steps[-1] + 0.5, max(rates) + 0.5, -0.5)
    image = axis.imshow(rows, aspect="auto", extent=extent, vmin=0, vmax=1, cmap="viridis", interpolation="none")
    axis.grid(False)
    axis.set_ylabel("layer")
    axis.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar = axis.figure.colorbar(image, ax=axis, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)


def draw_points(axis: Axes, points: Sequence[tuple[str, bool, float, float]], horizontal: str, vertical: str) -> None:
    """Draw models as numbered points.

    Args:
        axis (`Axes`): axes to draw on.
        points (sequence of `(label, is_dense, x, y)`): one per model.
        horizontal, vertical (`str`): labels of the axes.
    """
    for label, is_dense, x, y in points:
        color = PALETTE["muted"] if is_dense else PALETTE["accent"]
        axis.plot([x], [y], "o", markersize=17, color=color)
        axis.text(x, y, label, ha="center", va="center_baseline", color=PALETTE["paper"], weight="bold")
    axis.margins(0.16)
    # The labels hold names of the user's texts, which matplotlib must not read as formulas.
    axis.set_xlabel(horizontal, parse_math=False)
    axis.set_ylabel(vertical, parse_math=False)


def draw_kept_of_several(
    axis: Axes, layers: Sequence[Sequence[int]], shares: Sequence[Sequence[float]], labels: Sequence[str]
) -> None:
    """Draw a line per checkpoint: the share of its units that every layer keeps."""
    styles = ("-", "--", ":", "-.")
    colors = ("accent", "attention", "mlp", "muted", "ink")
    for place, (where, kept, label) in enumerate(zip(layers, shares, labels)):
        color = PALETTE[colors[place % len(colors)]]
        axis.plot(where, kept, color=color, linestyle=styles[place % len(styles)], linewidth=1.8, label=label)
    add_legend(axis)
    axis.set_ylim(0, 1.04)
    axis.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    number_layers(axis, sorted({layer for where in layers for layer in where}))


def kind_name(kind: str) -> str:
    """Return the name of a sublayer of a kind."""
    names: dict[str, str] = {UnitKind.MLP: "MLP", UnitKind.EXPERT: "experts"}
    return names.get(kind, "attention")


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
