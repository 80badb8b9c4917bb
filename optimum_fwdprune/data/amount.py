"""How many calibration windows a request has by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..architectures import Site, find_sites
from ..request.choices import ReconstructionKind, ReconstructionOrder
from ..request.fields import AUTO


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..request.config import PruningConfig


# Least squares on a width of d features determines d numbers per output, for which several tokens per feature are
# needed. With 16 of them, models of up to 2,048 features have the fewest windows.
TOKENS_PER_FEATURE = 16

# The fewest windows, which is also their number where nothing is refitted.
FEWEST_WINDOWS = 128

# The most tokens. Sequential least squares holds three hidden states of every token in the memory of the host, 13 GB
# for this many and a hidden size of 8,192, and it takes as long as about five forward passes over them.
MOST_TOKENS = 2**18


@dataclass(frozen=True)
class Amount:
    """The number of calibration windows of a request for a model.

    Args:
        windows (`int`): the number of windows.
        features (`int`, *optional*): the width that it follows, if this is more than `FEWEST_WINDOWS`; of experts, the
            width times the number of experts that share the tokens of one.
        is_default (`bool`): whether the request leaves the number open. Then less text is used as it is.
    """

    windows: int
    features: int | None = None
    is_default: bool = False

    @classmethod
    def of(cls, config: PruningConfig, model: PreTrainedModel) -> Amount:
        """Return `n_samples`, or its default, which follows the widest projection that the request may refit."""
        if config.n_samples != AUTO:
            return cls(int(config.n_samples))
        features = max(map(_features, _refitted(find_sites(model, config.attention_unit), config)), default=0)
        windows = -(-min(TOKENS_PER_FEATURE * features, MOST_TOKENS) // config.seq_len)
        if windows <= FEWEST_WINDOWS:
            return cls(FEWEST_WINDOWS, is_default=True)
        return cls(windows, features, is_default=True)

    def why(self) -> str:
        """Return the reason for a default number as a part of a sentence; empty where there is none."""
        if self.features is None:
            return ""
        return (
            f", {TOKENS_PER_FEATURE} for each of {self.features:,} features of the widest projection that may be "
            f"refitted, and at most {MOST_TOKENS:,}; set n_samples to use another amount"
        )


def with_number(config: PruningConfig, windows: int | None) -> PruningConfig:
    """Return a request that has the number of windows which were used in the place of the default, so that its record
    does not depend on later defaults; `windows` is `None` where there are none."""
    if config.n_samples != AUTO or windows is None:
        return config
    return dataclasses.replace(config, n_samples=windows)


def _refitted(sites: Iterable[Site], config: PruningConfig) -> list[Site]:
    """Return the sites that the reconstruction of a request may refit."""
    if config.reconstruction != ReconstructionKind.LEAST_SQUARES:
        return []
    # Projections after a removed unit and, before removed layers, all of them compensate for the loss.
    removes_experts_alone = config.prunes_experts and not config.width_kinds and config.depth_kind is None
    is_independent = config.reconstruction_order == ReconstructionOrder.INDEPENDENT
    compensates = not removes_experts_alone and (not is_independent or config.depth_kind is not None)
    return [site for site in sites if site.kind in config.resolved_kinds or (compensates and site.routing is None)]


def _features(site: Site) -> int:
    """Return the number of input features of a site's projection; of an expert, times the experts per chosen one."""
    if site.routing is None:
        return site.projection.in_features
    experts: Any = site.routing
    return experts.output_weight(0).shape[1] * site.num_units // experts.chosen
