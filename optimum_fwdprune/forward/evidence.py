"""Calibration tokens of a model, and the statistics that were collected on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..architectures import SiteKey
from ..data.calibration import Calibration
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
    """

    calibration: Calibration | None = None
    statistics: Mapping[SiteKey, SiteStatistics] = field(default_factory=dict)
    grams: Grams = field(default_factory=dict)
