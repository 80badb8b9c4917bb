"""What is known of a model from running calibration text through it."""

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
    """Calibration text, and what was measured on it.

    Args:
        calibration (`Calibration`, *optional*): the tokens; `None` where nothing needs any.
        statistics (mapping of site key to `SiteStatistics`): moments, where they were gathered.
        grams (`Grams`): for independent least squares, where they were gathered along with the statistics.
    """

    calibration: Calibration | None = None
    statistics: Mapping[SiteKey, SiteStatistics] = field(default_factory=dict)
    grams: Grams = field(default_factory=dict)
