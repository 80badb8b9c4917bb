"""What a scoring function is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..architectures import Site, SiteKey
    from ..calibration import Calibration
    from ..configuration import PruningConfig
    from ..statistics import SiteStatistics


@dataclass(frozen=True)
class ScoringInputs:
    """Everything a criterion may look at; it must not change the model.

    Args:
        model (`PreTrainedModel`): the dense model, in eval mode.
        sites (`list[Site]`): its sites.
        statistics (mapping of site key to `SiteStatistics`): what the method declared that it needs; empty otherwise.
        calibration (`Calibration`, *optional*): the tokens; `None` for methods that declared no need for them.
        config (`PruningConfig`): the method's config.
    """

    model: PreTrainedModel
    sites: list[Site]
    statistics: Mapping[SiteKey, SiteStatistics]
    calibration: Calibration | None
    config: PruningConfig
