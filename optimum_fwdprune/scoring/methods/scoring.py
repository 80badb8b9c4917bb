"""The inputs of scoring functions, and their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...request.choices import DepthKind, UnitKind


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ...allocation.depth import DepthUnit
    from ...architectures import Site, SiteKey
    from ...forward.statistics import SiteStatistics


# The kinds that methods may score. Requests for layers or sublayers that a method scores have no other kinds.
DEPTH_KINDS = tuple(map(str, DepthKind))
EXPERT_KINDS = (str(UnitKind.EXPERT),)
EVERY_KIND = (*map(str, UnitKind), *DEPTH_KINDS)


@dataclass(frozen=True)
class ScoringInputs:
    """The inputs of a criterion, which must not change the model.

    Args:
        model (`PreTrainedModel`): the dense model, in eval mode.
        sites (`list[Site]`): its sites.
        statistics (mapping of site key to `SiteStatistics`): the statistics that the method declared, on the devices
            that the sites compute on; empty if it declared none.
        calibration (`Calibration`, *optional*): the tokens; `None` for methods that declared no need for them.
        config: the method's own config.
        keep (`Callable`): returns the units that the request would keep, from scores of every unit by site key, for
            methods that stop once these units no longer change.
        resume (`Resume`): folder for the state of methods that take long.
    """

    model: PreTrainedModel
    sites: list[Site]
    statistics: Mapping[SiteKey, SiteStatistics]
    calibration: Any
    config: Any
    keep: Callable[[Mapping[SiteKey, Tensor]], dict[SiteKey, list[int]]]
    resume: Any

    @property
    def depth_units(self) -> list[DepthUnit]:
        """The layers or sublayers to score instead of units of sites, if the request is for these; otherwise none."""
        from ...allocation.depth import depth_units

        kind = self.config.depth_kind
        # Iterating over the sites would read offloaded weights.
        return [] if kind is None else depth_units(self.sites[:], kind)


@dataclass(frozen=True)
class UnitScores:
    """Scores with further results of a criterion. A criterion without these returns a mapping of scores instead.

    Args:
        values (`dict[SiteKey, Tensor[num_units]]`): the scores; units with higher scores are kept.
        standard_errors (`dict[SiteKey, Tensor[num_units]]`): standard errors of estimated scores.
        details (`dict`): figures on how the scores were computed, as JSON values, for the plan's metadata.
        history (`dict[str, Tensor]`): values of every step of a method that learns, for the scores file.
    """

    values: Mapping[SiteKey, Tensor]
    standard_errors: Mapping[SiteKey, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    history: Mapping[str, Tensor] = field(default_factory=dict)
