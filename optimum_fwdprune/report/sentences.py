"""How a model was pruned, as the sentences of its model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..allocation.composing import EARLIER
from ..allocation.losses import layers_named, losses_name, removed_depth, rerouted
from ..allocation.plan import PruningPlan
from ..record.outcome import Outcome
from ..record.record import Record
from ..record.reproduction import INPUTS
from ..recovery.options import BLOCK_DISTILL, DISTILL
from ..request.choices import ReconstructionKind, ReconstructionOrder, Scope, UnitKind
from ..scoring.methods import get_method
from .numbers import calibration_in_words, written


def how_small_it_is(outcome: Outcome | None) -> Iterator[str]:
    """Yield a sentence on the size of the whole model."""
    if outcome is not None:
        before, after = (written(value, "millions") for value in (outcome.parameters_before, outcome.parameters_after))
        yield f"It has {after} of {before} parameters ({-outcome.model_sparsity:+.1%})."


def what_was_removed(plan: PruningPlan | None) -> Iterator[str]:
    """Yield sentences on the layers, sublayers and units that a plan removes."""
    if plan is None:
        return
    depth = list(_what_depth_was_removed(plan))
    yield from depth
    left = [key for key, units in plan.kept.items() if units]
    names = {str(kind): losses_name(kind, plan.attention_unit) for kind in UnitKind}
    removed = [kind for kind in UnitKind if any(plan.removed(key) for key in left if key.kind == kind)]
    kept = [kind for kind in UnitKind if kind not in removed and any(key.kind == kind for key in left)]
    if removed:
        text = " and ".join(names[kind] for kind in removed)
        where = " of other layers" if depth else ""
        rest = f", and all {names[kept[0]]} were kept" if kept and not depth else ""
        yield f"{text[0].upper()}{text[1:]}{where} were removed{rest}."
        if sentence := rerouted(plan):
            yield sentence
    elif not depth:
        yield "No unit was removed: every layer keeps its size."


def _what_depth_was_removed(plan: PruningPlan) -> Iterator[str]:
    layers, sublayers = removed_depth(plan.kept)
    if layers:
        total = len({layer for layer, _ in plan.kept})
        yield f"Of its {total} layers, which are numbered from 0, {layers_named(layers)} {_was(layers)} removed."
    for kind, numbers in sublayers.items():
        name = "attention" if kind == UnitKind.ATTENTION else "MLP" if len(numbers) == 1 else "MLPs"
        verb = "was" if kind == UnitKind.ATTENTION else _was(numbers)
        yield f"The {name} of {layers_named(numbers)} {verb} removed."
    if layers:
        yield "The layers that were kept are numbered anew."


def _was(numbers: Sequence[int]) -> str:
    return "was" if len(numbers) == 1 else "were"


def how_units_were_chosen(record: Record) -> Iterator[str]:
    """Yield sentences on the methods and the calibration text of a pruning."""
    config, plan = record.config, record.plan
    if config is None or plan is None or not any(map(plan.removed, plan.kept)):
        return
    if plan.metadata.get("replayed"):
        yield "The choice of units was read from an existing plan."
        return
    means = "with back-propagation" if get_method(config.method).differentiates(config) else "with forward passes only"
    rounds = f" in {config.rounds} rounds" if config.rounds > 1 else ""
    others = []
    if config.depth_kind is not None and config.unit_kinds:
        others.append(f"`{config.resolved_depth_method}` chose the {config.depth_kind}s")
    if config.prunes_experts and config.width_kinds:
        others.append(f"`{config.resolved_expert_method}` chose the experts")
    if others:
        yield f"The method {', '.join(others)}, and `{config.method}` the rest, {means}."
    else:
        yield f"The method `{config.method}` chose them{rounds}, {means}."
    if config.resolved_scope == Scope.SEARCH:
        yield "A search that compared whole pruned models decided how many units each layer keeps."
    if text := calibration_of(record):
        yield f"It was calibrated on {calibration_in_words(text)}."


def what_became_of_the_weights(record: Record) -> Iterator[str]:
    """Yield sentences on what the weights started from, and on their reconstruction."""
    config = record.config
    if config is None:
        return
    metadata = record.plan.metadata if record.plan is not None else {}
    earlier = metadata.get(EARLIER) or []
    was_pruned = bool(earlier or (metadata.get(INPUTS) or {}).get("was_pruned"))
    if was_pruned:
        yield "The model had been pruned before, and this pruning started from the weights that it had then."
    for recovery in (pruning.get("recovery") for pruning in earlier):
        if recovery:
            yield f"Before this pruning it had been trained {_training_in_words(recovery)}."
    if config.reconstruction == ReconstructionKind.NONE:
        owner = "model before this pruning" if was_pruned else "dense model"
        yield f"The weights that were kept are equal to those of the {owner}."
    elif config.reconstruction == ReconstructionKind.BIAS:
        yield "Biases of the output projections replace the mean output of the removed units."
    else:
        order = " one layer after the other" if config.reconstruction_order != ReconstructionOrder.INDEPENDENT else ""
        what = "kept columns of output projections"
        if config.refit_sources:
            what = "kept columns of the output projections, and the linears before them,"
        if config.prunes_experts:
            what = "output projections of the kept experts"
        yield f"The {what} were refitted by least squares{order}."


def how_it_was_trained(record: Record) -> Iterator[str]:
    """Yield a sentence on the training after the pruning, if there was any."""
    recovery = record.recovery
    if not recovery:
        return
    first = (*recovery.get("earlier", ()), recovery)[0]
    beginning = "It" if "round" in first else "Afterwards it"
    yield f"{beginning} was trained {_training_in_words(recovery)}."


# What a model is trained towards, by mode, besides its data.
TOWARDS = {
    DISTILL: ", towards the predictions of the dense model",
    BLOCK_DISTILL: ", towards the hidden states of the dense model",
}


def _training_in_words(recovery: Mapping[str, Any]) -> str:
    stages = (*recovery.get("earlier", ()), recovery)
    words = []
    for stage, before in zip(stages, ({}, *stages)):
        number = stage.get("round")
        when = "then " if before else ""
        if number is not None and number != before.get("round"):
            when = f"after round {number} "
        words.append(f"{when}{_stage_in_words(stage)}")
    return "; ".join(words)


def _stage_in_words(recovery: Mapping[str, Any]) -> str:
    what = "with LoRA adapters, which are merged into the weights," if recovery.get("adapters") else "in all weights"
    if recovery.get("mode") == BLOCK_DISTILL:
        what = "layer by layer"
    if frozen := recovery.get("frozen"):
        what = f"in part, with {frozen} frozen,"
    per_layer = " each" if recovery.get("mode") == BLOCK_DISTILL else ""
    number = recovery.get("steps")
    steps = "" if number is None else f" for {number} step{'s' * (number != 1)}{per_layer}"
    data = f" on `{recovery['dataset']}`" if "dataset" in recovery else ""
    towards = TOWARDS.get(recovery.get("mode", ""), "")
    return f"{what}{steps}{data}{towards}"


def calibration_of(record: Record) -> str | None:
    """Return the name of the calibration data; `None` where it was not recorded."""
    if record.outcome is not None:
        return record.outcome.calibration
    recorded = (record.plan.metadata.get("calibration") if record.plan else None) or {}
    return recorded.get("source")
