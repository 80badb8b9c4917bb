"""The report of a pruned checkpoint, read from its files; no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..allocation.plan import PLAN_NAME
from ..architectures import find_sites, get_architecture, is_pruned
from ..architectures.sizes import ModelSizes
from ..evaluation import Comparison
from ..models.per_layer import stock_config
from ..record.record import OUTCOME_NAME, Record
from .document import describe
from .pruning import PruningReport


def describe_checkpoint(
    model_id: str | Path, comparison: Comparison | None = None, name: str | None = None, **hub_kwargs
) -> dict[str, Any]:
    """Return what is known of a pruned checkpoint as JSON values; see [`describe`].

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        comparison (`Comparison`, *optional*): what was measured, the dense model first and this one last; by default
            what the checkpoint itself carries.
        name (`str`, *optional*): to show; by default the folder's or the repository's.
        hub_kwargs: `revision`, `token`, `cache_dir`, `trust_remote_code` and the like.

    Raises:
        ValueError: where it is no pruned checkpoint, or a file in it is damaged, naming it.
        OSError: where there is no such folder or repository.
    """
    path = Path(model_id)
    if path.is_file():
        raise ValueError(f"{path} is a file; a report is of the folder of a pruned checkpoint, or of its repository.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: it is no checkpoint, or a part of one.")
    where = {key: value for key, value in hub_kwargs.items() if key != "trust_remote_code"}
    record = Record.of_checkpoint(model_id, **where)
    if record.plan is None and not path.exists():
        try:
            AutoConfig.from_pretrained(model_id, **hub_kwargs)
        except OSError as error:
            raise OSError(f"There is no folder {model_id}, nor a repository to be read: {error}") from error
    if record.plan is None:
        raise ValueError(f"{model_id} has no {PLAN_NAME}: it is dense, or was pruned by other means.")
    try:
        config = AutoConfig.from_pretrained(model_id, **hub_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json of {model_id} is not JSON: {error}.") from error
    model = skeleton_of(config)
    try:
        record.plan.check_left(find_sites(model, record.plan.attention_unit))
    except ValueError as error:
        raise ValueError(f"{model_id}: {error}") from error
    report = report_of(model, record)
    if comparison is None and record.outcome.get("comparison"):
        comparison = Comparison.from_list(record.outcome["comparison"])
    return describe(name or (path.name if path.exists() else str(model_id)), report, record, comparison)


def report_of(model: PreTrainedModel, record: Record) -> PruningReport | None:
    """Return what a checkpoint's record says that pruning did; `None` where that is not to be known.

    A checkpoint of before sizes were recorded is compared with the dense model that its config speaks of, unless it
    was pruned from a pruned one.

    Args:
        model (`PreTrainedModel`): the pruned model; on the meta device will do.
        record (`Record`): with a plan.

    Raises:
        ValueError: where a figure of the record is missing.
    """
    plan = record.plan
    assert plan is not None
    if record.outcome.get("report"):
        try:
            return PruningReport.from_dict(record.outcome["report"], record=record)
        except ValueError as error:
            raise ValueError(f"{OUTCOME_NAME} is damaged. {error}") from error
    dense = _dense_skeleton(model)
    sites = find_sites(dense, plan.attention_unit)
    if {site.key: site.num_units for site in sites} != plan.num_units:
        return None
    # Not those of the pruned model: a query head that is left alone with its keys and values owns them there.
    per_unit = {site.key: site.unit_parameters for site in sites}
    calibration = plan.metadata.get("calibration") or {}
    before, after = ModelSizes.of(dense), ModelSizes.of(model)
    return PruningReport(
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        prunable_parameters=sum(plan.num_units[key] * each for key, each in per_unit.items()),
        removed_parameters=sum(len(plan.removed(key)) * each for key, each in per_unit.items()),
        requested_sparsity=plan.metadata.get("requested_sparsity"),
        masked_difference=None,
        seconds={},
        calibration=calibration.get("source"),
        unit_parameters=per_unit,
        record=record,
    )


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the pruned model of a config without its weights, for the task that it was saved with.

    Raises:
        ValueError: where the config is not that of a pruned model.
    """
    architecture = get_architecture(config)
    if not is_pruned(config):
        raise ValueError(f"model_type {config.model_type!r} is a dense one, and a plan lies beside it.")
    named = [each for each in architecture.model_classes if each.__name__ in (config.architectures or ())]
    with torch.device("meta"):
        return (named or architecture.model_classes)[0]._from_config(config)


def _dense_skeleton(model: PreTrainedModel) -> PreTrainedModel:
    stock: Any = get_architecture(model.config).pruned_class(model).__bases__[-1]
    with torch.device("meta"):
        return stock._from_config(stock_config(model.config))
