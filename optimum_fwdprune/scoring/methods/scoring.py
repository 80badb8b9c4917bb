"""What a scoring function is given, and what it may give back."""

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


# What methods may score. Layers and sublayers are those of requests for nothing else.
DEPTH_KINDS = tuple(map(str, DepthKind))
EVERY_KIND = (*map(str, UnitKind), *DEPTH_KINDS)


@dataclass(frozen=True)
class ScoringInputs:
    """Everything a criterion may look at; it must not change the model.

    Args:
        model (`PreTrainedModel`): the dense model, in eval mode.
        sites (`list[Site]`): its sites.
        statistics (mapping of site key to `SiteStatistics`): what the method declared that it needs, on the device
            where the site computes; empty otherwise.
        calibration (`Calibration`, *optional*): the tokens; `None` for methods that declared no need for them.
        config: the method's own config.
        keep (`Callable`): scores of every unit in, by site key; out what the request would keep under them, for
            methods that stop once that is settled.
        resume (`Resume`): where methods that take long keep their state.
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
        """The layers or sublayers, where the request is for these: what is scored instead of units of sites."""
        from ...allocation.depth import depth_units

        kind = self.config.depth_kind
        # Iterating over the sites reads their weights where these are offloaded.
        return [] if kind is None else depth_units(self.sites[:], kind)


@dataclass(frozen=True)
class UnitScores:
    """Scores of a criterion that has more to say than one number per unit; otherwise a plain mapping will do.

    Args:
        values (`dict[SiteKey, Tensor[num_units]]`): higher is kept.
        standard_errors (`dict[SiteKey, Tensor[num_units]]`): how far each score may be off, where it was estimated.
        details (`dict`): how the scores came about, as JSON values, for the plan's record.
        history (`dict[str, Tensor]`): what happened step by step, for the scores file.
    """

    values: Mapping[SiteKey, Tensor]
    standard_errors: Mapping[SiteKey, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    history: Mapping[str, Tensor] = field(default_factory=dict)
