"""Calibration tokens of a model, and the statistics that were collected on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..architectures import SiteKey
from ..data.calibration import Calibration
from ..runs.shelves import Shelf
from .statistics import SiteStatistics


# Statistics with Gram matrices of every site: on the tokens to fit and on those held out.
Grams = dict[SiteKey, list[SiteStatistics]]


@dataclass(frozen=True)
class Evidence:
    """Calibration tokens, and the statistics that were collected on them.

    Args:
        calibration (`Calibration`, *optional*): the tokens; `None` where none are needed.
        statistics (mapping of site key to `SiteStatistics`): moments, if they were collected.
        grams (`Grams`): Gram matrices for independent least squares, if they were collected with the statistics.
        dense_stream (`Shelf`, *optional*): storage for the dense model's hidden states on the tokens, if several
            reconstructions share them; the first one that needs them computes them. By default each computes its own,
            and stores those of few layers at a time.
    """

    calibration: Calibration | None = None
    statistics: Mapping[SiteKey, SiteStatistics] = field(default_factory=dict)
    grams: Grams = field(default_factory=dict)
    dense_stream: Shelf | None = None
