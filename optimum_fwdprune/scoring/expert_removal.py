"""The order of removal of experts: in every layer, first the one whose removal changes the predictions least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..architectures import Site, SiteKey
from ..forward.divergence import Divergence
from ..forward.gates import Projection, kept_projection
from ..loading.subject import Subject
from ..runs import ranks
from ..runs.progress import progress
from ..runs.resume import State
from .methods.scoring import ScoringInputs, UnitScores
from .removal import Change, check_generates, measured_together


@dataclass
class ExpertRemovalState:
    """The state from which an interrupted measurement of the order resumes.

    Args:
        removed (`dict[str, list[int]]`): the removed experts of every mixture, first to last, by its key.
        left (`dict[str, list[float]]`): the divergence after removing an expert, by its last measurement; infinity
            before the first.
        losses (`list[float]`): divergence after every removal, in nats per token.
        windows (`float`): number of passes of a window through all layers so far.
    """

    removed: dict[str, list[int]]
    left: dict[str, list[float]]
    losses: list[float] = field(default_factory=list)
    windows: float = 0.0

    @classmethod
    def before(cls, mixtures: list[Site]) -> ExpertRemovalState:
        """Return the state before the first removal."""
        keys = [str(site.key) for site in mixtures]
        return cls({key: [] for key in keys}, {str(site.key): [float("inf")] * site.num_units for site in mixtures})

    def state(self) -> State:
        return {}, {name: getattr(self, name) for name in ("removed", "left", "losses", "windows")}

    @classmethod
    def of(cls, _tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> ExpertRemovalState:
        return cls(**numbers)

    def kept(self, site: Site) -> list[int]:
        """Return the experts of a mixture that are not removed."""
        removed = set(self.removed[str(site.key)])
        return [expert for expert in range(site.num_units) if expert not in removed]

    def scores(self, site: Site) -> torch.Tensor:
        """Return the ranks of the experts of a mixture: the removed ones in their order, then the others by their last
        measurement."""
        left = self.left[str(site.key)]
        ranked = [*self.removed[str(site.key)], *sorted(self.kept(site), key=left.__getitem__)]
        values = torch.empty(site.num_units)
        values[ranked] = torch.arange(site.num_units, dtype=torch.float32)
        return values


@torch.no_grad()
def expert_removal_order(inputs: ScoringInputs) -> UnitScores:
    """Remove the expert that raises the divergence from the dense model least, in every layer one after the other, and
    return the order.

    In a round every layer loses an expert of every group. Rounds go from the last layer to the first, so that the
    hidden states before a layer are those at the start of the round. All candidates are measured on the same tokens,
    without the experts that are already removed. With several processes, each measures a share of the candidates.

    Args:
        inputs (`ScoringInputs`): the inputs of a request for experts.

    Raises:
        ValueError: where the model does not predict tokens.
    """
    check_generates(inputs.model)
    config, mixtures = inputs.config, inputs.sites[:]
    calibration = inputs.calibration.part(slice(None, config.removal_windows))
    stage = inputs.resume.stage("expert-removal", calibration)
    state = stage.load(ExpertRemovalState.of) or ExpertRemovalState.before(mixtures)
    divergence: Divergence | None = None
    steps = [
        (number, site, group)
        for number in range(_rounds(inputs, mixtures))
        for site in reversed(mixtures)
        for group in range(site.num_groups)
    ]
    settled = -1
    for number, site, group in progress(steps, "Measuring removals of experts", unit="removal"):
        if len(state.removed[str(site.key)]) > number * site.num_groups + group:
            continue
        if divergence is None:
            divergence = Divergence(Subject(inputs.model, mixtures), calibration, config.batch_size)
        if settled != number:
            divergence.settle(_projections(mixtures, state))
            state.windows += divergence.windows
            divergence.windows, settled = 0.0, number
        _remove_one(divergence, mixtures, site, group, state)
        stage.save(state.state)
    details = {"removed": state.removed, "divergence": state.losses, "windows": round(state.windows, 1)}
    return UnitScores({site.key: state.scores(site) for site in mixtures}, details=details)


def _rounds(inputs: ScoringInputs, mixtures: list[Site]) -> int:
    """Return how many experts of every group the request removes."""
    site, config = mixtures[0], inputs.config
    if not config.has_target:
        return round(config.sparsity * site.num_units / site.num_groups)
    # Their number does not depend on scores.
    kept = inputs.keep({other.key: torch.zeros(other.num_units) for other in mixtures})
    return (site.num_units - len(kept[site.key])) // site.num_groups


def _remove_one(
    divergence: Divergence, mixtures: list[Site], site: Site, group: int, state: ExpertRemovalState
) -> None:
    """Remove an expert of a group of a mixture, and take note of its measurements."""
    per_group, kept = site.num_units // site.num_groups, state.kept(site)
    candidates = [expert for expert in kept if expert // per_group == group]
    projections = _projections(mixtures, state)

    def changed(place: int) -> Change:
        others = [expert for expert in kept if expert != candidates[place]]
        return projections | {site.key: kept_projection(site, others)}, site.layer

    losses, windows = measured_together(divergence, len(candidates), changed, ranks.own(range(len(candidates))))
    for expert, loss in zip(candidates, losses):
        state.left[str(site.key)][expert] = loss
    state.removed[str(site.key)].append(candidates[losses.index(min(losses))])
    state.losses.append(min(losses))
    state.windows += windows


def _projections(mixtures: list[Site], state: ExpertRemovalState) -> dict[SiteKey, Projection]:
    changed = [site for site in mixtures if state.removed[str(site.key)]]
    return {site.key: kept_projection(site, state.kept(site)) for site in changed}
