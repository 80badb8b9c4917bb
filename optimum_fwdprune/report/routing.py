"""How many tokens the experts of a mixture have before and after others are removed, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..allocation.losses import dense_routing
from ..allocation.plan import PruningPlan
from ..request.choices import UnitKind
from .canvas import PALETTE, add_legend, number_layers


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Shares of the experts of a layer that have at most as many tokens.
PLACES = {"least": 0.0, "q25": 0.25, "q50": 0.5, "q75": 0.75, "most": 1.0}


def routing_of(plan: PruningPlan) -> list[dict[str, Any]]:
    """Return the routing of calibration tokens by layer, as JSON values.

    Args:
        plan (`PruningPlan`): a plan, with the counts of tokens in its metadata.

    Returns:
        `list[dict]`: an entry per layer with counted experts: `layer`; `removed`, the share of the choices of the
        dense model's router that fell on removed experts; and `before` and `after`, the quantiles `PLACES` of the
        numbers of tokens of all experts in the dense model and of the kept ones in the pruned model, divided by their
        mean. `after` is `None` where the pruned model was not counted, since nothing was fitted in it.
    """
    fitted = plan.metadata.get("reconstructed") or {}
    rows = []
    for key, counts in dense_routing(plan).items():
        kept = sum(counts[expert] for expert in plan.kept[key])
        after = (fitted.get(str(key)) or {}).get("routed")
        rows.append(
            {
                "layer": key.layer,
                "removed": 1 - kept / sum(counts),
                "before": _relative(counts),
                "after": _relative(after) if after and sum(after) else None,
            }
        )
    return rows


def _relative(counts: Sequence[int]) -> dict[str, float]:
    shares = np.array(counts) / np.mean(counts)
    return {name: float(np.quantile(shares, place)) for name, place in PLACES.items()}


def draw_tokens_of_experts(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the tokens of the experts of each layer before and after pruning: a thin line for all experts, a thick one
    for half of them, and a dot for the median.

    Args:
        axis (`Axes`): axes to draw on.
        rows (sequence of mappings): the routing, as [`routing_of`] returns it.
    """
    for when, color, place in (("before", PALETTE["muted"], -0.16), ("after", PALETTE[UnitKind.EXPERT], 0.16)):
        known = [(row["layer"] + place, row[when]) for row in rows if row[when]]
        if not known:
            continue
        where = [at for at, _ in known]
        for low, high, width in (("least", "most", 1.0), ("q25", "q75", 4.0)):
            axis.vlines(
                where, [at[low] for _, at in known], [at[high] for _, at in known], color=color, linewidth=width
            )
        medians = [at["q50"] for _, at in known]
        axis.plot(where, medians, "o", markersize=4, color=color, markeredgecolor=PALETTE["paper"], label=when)
    axis.axhline(1, color=PALETTE["grid"], linewidth=0.8, zorder=0)
    axis.set_title("tokens of an expert")
    axis.set_ylabel("of the layer's mean")
    axis.set_ylim(0)
    add_legend(axis)
    number_layers(axis, [row["layer"] for row in rows])


def draw_removed_choices(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw a bar per layer: the share of the router's choices that fell on experts which are removed.

    Args:
        axis (`Axes`): axes to draw on.
        rows (sequence of mappings): the routing, as [`routing_of`] returns it.
    """
    layers = [row["layer"] for row in rows]
    axis.bar(layers, [100 * row["removed"] for row in rows], width=0.74, color=PALETTE["removed"])
    axis.set_title("choices of removed experts")
    axis.set_ylabel("% of all choices")
    number_layers(axis, layers)
