"""The order of removal of layers or sublayers: first the one whose removal changes the model's predictions least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..allocation.depth import DepthUnit, can_go, number_removed, open_units
from ..architectures import SiteKey
from ..forward.divergence import Divergence
from ..forward.gates import Projection, kept_projection
from ..loading.subject import Subject
from ..runs import ranks
from ..runs.progress import progress
from ..runs.resume import State
from .methods.scoring import ScoringInputs, UnitScores


# The projections that a removal changes, and the first layer that differs.
Change = tuple[dict[SiteKey, Projection], int]


@dataclass
class RemovalState:
    """The state from which an interrupted measurement of the order resumes.

    Args:
        left (`list[float]`): the divergence after removing a unit, by its last measurement; infinity before the first.
        order (`list[int]`): indices of the removed units, first to last.
        losses (`list[float]`): divergence after every removal, in nats per token.
        windows (`float`): number of passes of a window through all layers so far.
    """

    left: list[float]
    order: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    windows: float = 0.0

    def state(self) -> State:
        return {}, {"order": self.order, "losses": self.losses, "windows": self.windows, "left": self.left}

    @classmethod
    def of(cls, _tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> RemovalState:
        return cls(numbers["left"], numbers["order"], numbers["losses"], numbers["windows"])

    def scores(self, units: Sequence[DepthUnit]) -> dict[SiteKey, torch.Tensor]:
        """Return the rank of every unit: removed units in their order, then the others by their last measurement."""
        others = sorted((place for place in range(len(units)) if place not in self.order), key=self.left.__getitem__)
        ranked = [*self.order, *others]
        return {units[place].key: torch.tensor([float(rank)]) for rank, place in enumerate(ranked)}


@torch.no_grad()
def removal_order(inputs: ScoringInputs) -> UnitScores:
    """Remove the unit that raises the divergence from the dense model least, repeat this, and return the order.

    All candidates of a step are measured on the same tokens, in the model without the units that are already removed.
    Layers before a candidate are not run again, and removed layers are not run. With several processes, each measures
    a share of the candidates.

    Args:
        inputs (`ScoringInputs`): the inputs of a request for layers or sublayers.

    Raises:
        ValueError: where the model does not predict tokens.
    """
    check_generates(inputs.model)
    config, sites = inputs.config, inputs.sites[:]
    units = inputs.depth_units
    is_open = {unit.key for unit in open_units(sites, config)}
    calibration = inputs.calibration.part(slice(None, config.removal_windows))
    stage = inputs.resume.stage("removal", calibration)
    state = stage.load(RemovalState.of) or RemovalState([float("inf")] * len(units))
    divergence: Divergence | None = None
    while not _enough(inputs, units, state):
        gone = [units[place] for place in state.order]
        candidates = [
            place
            for place, unit in enumerate(units)
            if unit.key in is_open and place not in state.order and can_go(sites, [*gone, unit])
        ]
        if not candidates:
            break
        if divergence is None:
            divergence = Divergence(Subject(inputs.model, sites), calibration, config.batch_size)
        losses, windows = _measured(divergence, gone, [units[place] for place in candidates])
        for place, loss in zip(candidates, losses):
            state.left[place] = loss
        best = losses.index(min(losses))
        state.order.append(candidates[best])
        state.losses.append(losses[best])
        state.windows += windows
        stage.save(state.state)
    details = {
        "removed": [str(units[place]) for place in state.order],
        "divergence": state.losses,
        "windows": round(state.windows, 1),
    }
    return UnitScores(state.scores(units), details=details)


def check_generates(model: PreTrainedModel) -> None:
    """Raise `ValueError` where a model does not predict tokens."""
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} does not predict the next token, and method='removal_loss' compares predictions. "
            f"Prune its causal counterpart, and replay the plan on this model, or use method='block_influence' for "
            f"layers and sublayers, or 'reap' for experts."
        )


def _enough(inputs: ScoringInputs, units: Sequence[DepthUnit], state: RemovalState) -> bool:
    """Return whether all units that the request removes are determined."""
    config = inputs.config
    if not config.has_target:
        return len(state.order) >= number_removed(inputs.sites[:], config)
    gone = {site.key for place in state.order for site in units[place].sites}
    return gone >= {key for key, kept in inputs.keep(state.scores(units)).items() if not kept}


def _measured(
    divergence: Divergence, gone: Sequence[DepthUnit], candidates: Sequence[DepthUnit]
) -> tuple[list[float], float]:
    """Return the divergence without the units in `gone` and one of the candidates, for every candidate, and the number
    of passes of a window through all layers in all processes. Passes that every process makes count once."""
    divergence.settle(_emptied(gone))
    shared, divergence.windows = divergence.windows, 0.0
    stage = f"Measuring removal {len(gone) + 1}"
    own = progress(ranks.own(range(len(candidates))), stage, unit="candidate")

    def changed(place: int) -> Change:
        unit = candidates[place]
        return _emptied([*gone, unit]), unit.key.layer

    losses, windows = measured_together(divergence, len(candidates), changed, own)
    return losses, shared + windows


def measured_together(
    divergence: Divergence, count: int, changed: Callable[[int], Change], own: Iterable[int]
) -> tuple[list[float], float]:
    """Return the divergence of every candidate, of which each process measures a share, and the number of passes of a
    window through all layers in all processes since the last ones were counted.

    Args:
        divergence ([`Divergence`]): measures a change of the model that it has settled on.
        count (`int`): the number of candidates.
        changed (`Callable`): returns the projections of a candidate, by its place, and the first layer that differs.
        own (iterable of `int`): the places of the candidates that this process measures.
    """
    losses = torch.zeros(count, dtype=torch.float64)
    for place in own:
        projections, first = changed(place)
        losses[place] = divergence.of(projections, first=first)
    windows = torch.tensor(divergence.windows, dtype=torch.float64)
    divergence.windows = 0.0
    return ranks.summed(losses).tolist(), float(ranks.summed(windows))


def _emptied(units: Iterable[DepthUnit]) -> dict[SiteKey, Projection]:
    return {site.key: kept_projection(site, []) for unit in units for site in unit.sites}
