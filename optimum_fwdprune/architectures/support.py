"""The ways in which the models of a family can be pruned."""

from __future__ import annotations

from typing import NamedTuple

from ..models.experts import SAME_WIDTH
from ..models.layout import DecoderLayout


class Support(NamedTuple):
    """Whether the models of a family can be pruned in one way.

    Args:
        possible (`bool`): whether they can be pruned.
        reason (`str`, *optional*): the reason why they cannot be pruned, as a clause.
    """

    possible: bool
    reason: str = ""


def support_of(layout: DecoderLayout) -> dict[str, Support]:
    """Return whether `"heads"`, `"channels"`, `"uneven layers"`, which are layers of different sizes, and `"experts"`
    of a family can be pruned.

    Args:
        layout (`DecoderLayout`): the layout of its decoder layers.
    """
    attention, has_experts = layout.attention, layout.experts is not None
    heads = Support(not attention.fixed, attention.fixed)
    channels = Support(False, SAME_WIDTH) if has_experts else Support(True)
    experts = Support(True) if has_experts else Support(False, "its layers have no experts.")
    # All families resize every layer to its own entry in the config. Sublayers of any family can be removed.
    return {"heads": heads, "channels": channels, "uneven layers": Support(True), "experts": experts}
