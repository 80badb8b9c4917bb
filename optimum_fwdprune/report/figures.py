"""The pictures of a report's page, drawn from its JSON values as SVG whose colours are those of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..architectures.site import unit_name
from ..request.choices import DepthKind, UnitKind
from . import pictures
from .canvas import PALETTE, drawing, new_figure
from .document import kinds_of
from .numbers import is_quality, is_speed
from .routing import draw_removed_choices, draw_tokens_of_experts


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In inches. It is the width of a phone, so that a phone shows the text unscaled.
WIDTH = 5.0


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Args:
        title (`str`): its title.
        caption (`str`): a sentence on how to read it.
        svg (`str`): an `<svg>` element.
    """

    title: str
    caption: str
    svg: str


def pictures_of(checkpoint: Mapping[str, Any], name: str) -> dict[str, list[Picture]]:
    """Draw a checkpoint: lists of pictures of its `layers`, `scores` and `learning`, empty where there are no data.

    Args:
        checkpoint (mapping): the checkpoint, as [`describe`] returns it.
        name (`str`): a name that is unique on the page; identifiers in the SVG begin with it.
    """
    return {
        "layers": _of_layers(checkpoint, name) if checkpoint["layers"] else [],
        "scores": [
            *(_of_scores(checkpoint, name) if checkpoint["scores"] else []),
            *(_of_depth(checkpoint["depth_scores"], name) if checkpoint["depth_scores"] else []),
        ],
        "learning": _of_learning(checkpoint["learning"], name) if checkpoint["learning"] else [],
    }


def pictures_of_all(document: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draw several checkpoints in one picture: quality against size and speed, and what each layer kept.

    Args:
        document (mapping): the report, as [`document_of`] returns it.
        models (sequence of mappings): `number`, `is_dense` and `figures` of every model that was measured.
    """
    drawings = []
    names = list(dict.fromkeys(name for model in models for name in model["figures"]))
    qualities, speeds = list(filter(is_quality, names)), list(filter(is_speed, names))
    for quality in qualities:
        for against, scale, label in (("parameters", 1e-6, "parameters, millions"), *((s, 1, s) for s in speeds[:1])):
            points = [
                (model["number"], model["is_dense"], scale * model["figures"][against], model["figures"][quality])
                for model in models
                if all(isinstance(model["figures"].get(name), (int, float)) for name in (against, quality))
            ]
            if len(points) > 1:

                def draw(axis: Axes, points=points, label=label, quality=quality) -> None:
                    pictures.draw_points(axis, points, label, quality)

                measure, side = ("speed", "right") if against in speeds else ("size", "left")
                drawings.append(
                    _draw(
                        f"all-{quality}-{measure}",
                        f"Quality against {measure}",
                        f"Models further down and to the {side} are better.",
                        [draw],
                        3.1,
                    )
                )
    checkpoints = [checkpoint for checkpoint in document["checkpoints"] if checkpoint["layers"]]
    if len(checkpoints) < 2:
        return drawings
    present = [kinds_of(checkpoint) for checkpoint in checkpoints]
    shared = [kind for kind in present[0] if all(kind in kinds for kinds in present)]
    return drawings + [_kept_of_all(checkpoints, kind) for kind in shared]


def _kept_of_all(checkpoints: Sequence[Mapping[str, Any]], kind: str) -> Picture:
    layers = [[row["layer"] for row in checkpoint["layers"]] for checkpoint in checkpoints]
    shares = [
        [row[kind]["kept"] / max(1, row[kind]["units"]) for row in checkpoint["layers"]] for checkpoint in checkpoints
    ]
    labels = [str(checkpoint["number"]) for checkpoint in checkpoints]

    def draw(axis: Axes) -> None:
        pictures.draw_kept_of_several(axis, layers, shares, labels)
        axis.set_xlabel("layer")

    titles: dict[str, str] = {UnitKind.MLP: "Kept MLP channels", UnitKind.EXPERT: "Kept experts"}
    title = titles.get(kind, "Kept attention units")
    return _draw(f"all-kept-{kind}", title, "Each line is a checkpoint, labelled with its number.", [draw], 2.6)


def _of_layers(checkpoint: Mapping[str, Any], name: str) -> list[Picture]:
    rows = checkpoint["layers"]
    layers, kinds = [row["layer"] for row in rows], kinds_of(checkpoint)

    def kept(kind: str) -> Callable[[Axes], None]:
        counts, units = ([row[kind][which] for row in rows] for which in ("kept", "units"))

        def draw(axis: Axes) -> None:
            pictures.draw_kept(axis, kind, layers, counts, units, unit_name(kind, checkpoint["attention_unit"]))
            if kind == kinds[-1]:
                axis.set_xlabel("layer")

        return draw

    drawn = [kept(kind) for kind in kinds]
    text = "The share of its units that each layer kept."
    if checkpoint["depth"]:
        text += " Hatched bars stand for an attention or an MLP that was removed."
    drawings = [_draw(f"{name}-kept", "Kept units", text, drawn, 1.8 * len(kinds), sharex=True)]
    # A layer of a mixture has a dense MLP or experts.
    if all(row[kind]["parameters"] or not row[kind]["units"] for row in rows for kind in kinds):
        sizes = {kind: [row[kind]["parameters"] or {"before": 0, "after": 0} for row in rows] for kind in kinds}
        before = [sum(of_layer["before"] for of_layer in of_kinds) for of_kinds in zip(*sizes.values())]
        after = {kind: [of_layer["after"] for of_layer in of_kind] for kind, of_kind in sizes.items()}

        def parameters(axis: Axes) -> None:
            pictures.draw_parameters(axis, layers, before, after)
            axis.set_xlabel("layer")

        text = "Prunable parameters of each layer after pruning (coloured), compared with before."
        drawings.append(_draw(f"{name}-parameters", "Parameters", text, [parameters], 3.6))
    if checkpoint["routing_by_layer"]:
        drawings.append(_of_routing(checkpoint["routing_by_layer"], name))
    return drawings


def _of_routing(rows: Sequence[Mapping[str, Any]], name: str) -> Picture:
    def removed(axis: Axes) -> None:
        draw_removed_choices(axis, rows)

    def tokens(axis: Axes) -> None:
        draw_tokens_of_experts(axis, rows)
        axis.set_xlabel("layer")

    text = (
        "The share of the router's choices that other experts take over, and the tokens of the experts of each layer: "
    )
    text += "a thin line for all of them, a thick one for half, a dot for the median."
    return _draw(f"{name}-routing", "Routing", text, [removed, tokens], 4.2, sharex=True)


def _of_scores(checkpoint: Mapping[str, Any], name: str) -> list[Picture]:
    kinds = [kind for kind in UnitKind if kind in checkpoint["scores"]]
    named: dict[str, str] = {kind: unit_name(kind, checkpoint["attention_unit"]) for kind in kinds}

    def histogram(kind: str) -> Callable[[Axes], None]:
        return lambda axis: pictures.draw_histogram(axis, kind, checkpoint["scores"][kind], named[kind])

    def by_layer(kind: str) -> Callable[[Axes], None]:
        spread = checkpoint["scores"][kind]

        def draw(axis: Axes) -> None:
            pictures.draw_spread_by_layer(axis, kind, spread["layers"], spread["is_log"], named[kind])
            if kind == kinds[-1]:
                axis.set_xlabel("layer")

        return draw

    height = 1.5 + 1.15 * len(kinds)
    return [
        _draw(
            f"{name}-histogram",
            "Distribution of scores",
            "The number of units by score; units with higher scores are kept first.",
            [histogram(kind) for kind in kinds],
            height,
        ),
        _draw(
            f"{name}-spread",
            "Scores by layer",
            "The line is the median of each layer; the bands hold half and nine tenths of its units.",
            [by_layer(kind) for kind in kinds],
            height,
            sharex=True,
        ),
    ]


def _of_depth(rows: Sequence[Mapping[str, Any]], name: str) -> list[Picture]:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))

    def of_kind(kind: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            pictures.draw_depth_scores(axis, kind, [row for row in rows if row["kind"] == kind])
            if kind == kinds[-1]:
                axis.set_xlabel("layer")

        return draw

    title = "Scores of layers" if kinds == [DepthKind.LAYER] else "Scores of sublayers"
    text = "The lowest scores are removed first. Hatched bars stand for what was removed."
    panels = [of_kind(kind) for kind in kinds]
    return [_draw(f"{name}-depth-scores", title, text, panels, 1.5 + 1.15 * len(kinds), sharex=True)]


def _of_learning(learning: Mapping[str, Any], name: str) -> list[Picture]:
    step = "sweep" if learning["is_search"] else "step"

    def over_steps(draw: Callable[..., None], *what: Any) -> Callable[[Axes], None]:
        def drawn(axis: Axes) -> None:
            draw(axis, *what, learning)
            axis.set_xlabel(step)
            # The page has titles of its own.
            axis.set_title("")

        return drawn

    text = f"The loss over the {step}s."
    drawings = [_draw(f"{name}-loss", "Loss", text, [over_steps(pictures.draw_loss)], 3.0)]
    if not learning["is_search"] and learning["entropy"] and learning["expected_sparsity"]:
        text = "The entropy of the masks, which is 0 once they are decided, and the share of units that they remove."
        drawings.append(_draw(f"{name}-masks", "Masks", text, [over_steps(pictures.draw_masks)], 3.0))
    for kind, title in ((UnitKind.ATTENTION, "Attention"), (UnitKind.MLP, "MLP")):
        drawn = [over_steps(pictures.draw_rates, kind)]
        text = f"The share of its units that each layer keeps, over the {step}s."
        drawings.append(_draw(f"{name}-rates-{kind}", f"{title} keep rates", text, drawn, 3.4))
    return drawings


def _draw(
    name: str, title: str, caption: str, panels: Sequence[Callable[[Axes], None]], height: float, sharex: bool = False
) -> Picture:
    output = io.StringIO()
    # Text is not turned into paths, and identifiers depend on the picture alone.
    with drawing(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = new_figure(WIDTH, height)
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=sharex)[:, 0]
        for axis, panel in zip(axes, panels):
            axis.set_facecolor("none")
            panel(axis)
        figure.savefig(output, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(title, caption, _themed(output.getvalue(), title))


def _themed(svg: str, title: str) -> str:
    """Return the `<svg>` element alone, scaled to the width of its container, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}" role="img"'
    svg = re.sub(r"<svg[^>]*>", f'{opening} aria-label="{title}">', svg, count=1)
    # Matplotlib gives groups the same identifiers in every picture. Unused ones are removed, since they would repeat.
    used = set(re.findall(r"(?:#|url\(#)([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for name, color in PALETTE.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"font: ([\d. a-z]*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", svg)
