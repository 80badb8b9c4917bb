"""Reading the record of a pruned checkpoint, which does not read weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..allocation.plan import PruningPlan
from ..architectures import find_sites, get_architecture, is_pruned
from ..architectures.sizes import ModelSizes
from ..loading.recorded import was_pruned
from ..loading.source import Source
from ..models.per_layer import stock_config
from .outcome import Outcome
from .record import Record


def read_record(model: PreTrainedModel, model_id: str | Path, source: Source) -> tuple[Record, Source]:
    """Return the record in a pruned model's checkpoint, and its source completed by the record.

    Of a dense model, the record is empty and the source stays the same. A model that lost whole layers or experts has
    a stock class, so that the files of its checkpoint tell whether it was pruned.

    Args:
        model (`PreTrainedModel`): the opened model; from now on its `save_pretrained` writes the record too.
        model_id (`str` or `Path`): the folder or repository that it was opened from.
        source (`Source`): how it was opened.

    Raises:
        ValueError: where a file of the record is damaged, or the plan does not fit the weights.
    """
    if not was_pruned(model_id, model.config, source.where):
        return Record(), source
    record = Record.of_checkpoint(model_id, **source.where)
    if not is_pruned(model.config) and record.plan is None:
        return Record(), source
    if record.plan is not None:
        record.plan.check_left(find_sites(model, record.plan.attention_unit))
    record = with_outcome(record, model)
    record.leave_with(model)
    return record, source.of_checkpoint(model_id, record.plan.metadata if record.plan else {})


def with_outcome(record: Record, model: PreTrainedModel) -> Record:
    """Return a record completed with the sizes before and after pruning, where they can be determined.

    Checkpoints of early versions have no sizes. Their model is compared with the dense model that its config
    describes, unless it was made from a model that was pruned already.

    Args:
        record (`Record`): record of the pruned model.
        model (`PreTrainedModel`): the pruned model, which may be on the meta device.
    """
    if record.plan is None or record.outcome is not None:
        return record
    return replace(record, outcome=_outcome_of(model, record.plan))


def _outcome_of(model: PreTrainedModel, plan: PruningPlan) -> Outcome | None:
    dense = _dense_skeleton(model)
    sites = find_sites(dense, plan.attention_unit)
    if {site.key: site.num_units for site in sites} != plan.num_units:
        return None
    # The sizes of units are the dense model's. In the pruned one, the last query head of a group owns its keys too.
    per_unit = {site.key: site.unit_parameters for site in sites}
    calibration = plan.metadata.get("calibration") or {}
    before, after = ModelSizes.of(dense), ModelSizes.of(model)
    return Outcome(
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        prunable_parameters=sum(plan.num_units[key] * parameters for key, parameters in per_unit.items()),
        removed_parameters=sum(len(plan.removed(key)) * parameters for key, parameters in per_unit.items()),
        requested_sparsity=plan.metadata.get("requested_sparsity"),
        masked_difference=None,
        seconds={},
        calibration=calibration.get("source"),
        unit_parameters=per_unit,
    )


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the pruned model of a config without its weights, for the task that it was saved with.

    Its class is a stock class where its config is that of one.
    """
    classes: list[Any] = list(get_architecture(config).model_classes)
    if not is_pruned(config):
        classes = [model_class.__bases__[-1] for model_class in classes]
    names = config.architectures or ()
    named = [model_class for model_class in classes if model_class.__name__ in names]
    with torch.device("meta"):
        return (named or classes)[0]._from_config(config)


def _dense_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    stock: Any = get_architecture(model.config).pruned_class(model).__bases__[-1]
    config = stock_config(model.config) if is_pruned(model.config) else model.config
    with torch.device("meta"):
        return stock._from_config(config)
