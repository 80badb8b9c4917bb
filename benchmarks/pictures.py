"""The pictures of the README and of docs/concepts/terms.md, each for light and for dark pages.

    python benchmarks/pictures.py CHECKPOINT

`CHECKPOINT` is a pruned model, whose kept units the first picture shows.
The second is a decoder layer and what pruning takes from it.
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from optimum_fwdprune import PruningPlan
from optimum_fwdprune.report import plot_plan


PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
INK = {"light": "#1f2328", "dark": "#e6edf3"}
# Okabe-Ito: told apart by people who do not see all colours.
ATTENTION, MLP = "#0072b2", "#e69f00"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="Folder of a pruned checkpoint, or its fwdprune_plan.json.")
    plan = PruningPlan.load(parser.parse_args().checkpoint)
    PICTURES.mkdir(exist_ok=True)
    for page, ink in INK.items():
        with matplotlib.rc_context(style(ink)):
            plot_plan(plan, PICTURES / f"kept_units-{page}.svg")
            draw_layer(ink).savefig(PICTURES / f"decoder_layer-{page}.svg")


def style(ink):
    """Settings for a picture on a page whose text has this colour; the page shows through."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        "axes.prop_cycle": matplotlib.cycler(color=[ATTENTION, MLP]),
        "font.size": 11,
        # The same plan gives the same file.
        "svg.hashsalt": "optimum-fwdprune",
    }


def draw_layer(ink):
    """A decoder layer: the linears of its two sites, and the blocks that go with two heads and four channels."""
    figure = Figure(figsize=(10, 4.7), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0, 20), ylim=(0, 9.2), aspect="equal")
    axis.axis("off")
    draw_stream(axis, ink)
    draw_site(axis, ink, 0.4, ("q_proj", "k_proj", "v_proj"), "o_proj", "heads", 6, {1, 4}, ATTENTION)
    draw_site(axis, ink, 11.9, ("gate_proj", "up_proj"), "down_proj", "channels", 12, {2, 5, 6, 10}, MLP)
    return figure


def draw_stream(axis, ink):
    axis.annotate("", (19.8, 0.7), (0.2, 0.7), arrowprops={"arrowstyle": "-|>", "color": ink, "linewidth": 2.5})
    axis.text(10, 0.02, "residual stream: the hidden size is never pruned", ha="center", color=ink)


def draw_site(axis, ink, left, sources, output, units, count, removed, color):
    """Sources with their rows, one block per unit, and the output projection with its columns."""
    size, gap, bottom = 1.75, 0.35, 3.6
    width = (len(sources) + 1) * (size + gap) + 0.7
    frame = FancyBboxPatch((left, 1.7), width, 6.6, boxstyle="round,pad=0.05,rounding_size=0.3", fill=False)
    frame.set(edgecolor=color, linewidth=1.3, linestyle=(0, (5, 3)))
    axis.add_patch(frame)
    kind = "attention" if units == "heads" else "mlp"
    axis.text(left + width / 2, 8.62, f'site (layer, "{kind}")', ha="center", weight="bold", color=ink)
    axis.text(left + width / 2, 2.05, f"{count} {units}, {len(removed)} removed", ha="center", color=ink)
    for number, name in enumerate(sources):
        x = left + 0.35 + number * (size + gap)
        for unit in range(count):
            height = size * 1.7 / count
            block(axis, ink, x, bottom + unit * height, size, height, unit in removed, color)
        axis.text(x + size / 2, bottom + size * 1.7 + 0.2, name, ha="center", color=ink, family="monospace")
    axis.text(left + 0.35, bottom - 0.5, "rows", color=ink, style="italic", size=10)
    x = left + width - size - 0.35
    y = bottom + 0.6
    for unit in range(count):
        block(axis, ink, x + unit * size / count, y, size / count, size, unit in removed, color)
    axis.text(x + size / 2, y + size + 0.2, output, ha="center", color=ink, family="monospace")
    axis.text(x, bottom - 0.5, "columns", color=ink, style="italic", size=10)
    arrow = {"arrowstyle": "-|>", "color": ink, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (left + 1.2, 1.65), (left + 1.2, 0.75), arrowprops=arrow)
    axis.annotate("", (x + size / 2, 0.75), (x + size / 2, 1.65), arrowprops=arrow)
    axis.text(x + size / 2 + 0.2, 1.02, "+", color=ink, size=14)
    axis.annotate("", (x - 0.05, y + size / 2), (x - 0.7, y + size / 2), arrowprops=arrow)


def block(axis, ink, x, y, width, height, is_removed, color):
    """One unit's part of a linear: filled where it stays, an empty dotted outline where it goes."""
    if is_removed:
        axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=ink, linewidth=0.9, linestyle=":"))
    else:
        axis.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=0.7))


if __name__ == "__main__":
    main()
