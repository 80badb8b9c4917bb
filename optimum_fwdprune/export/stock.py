"""Stock export: a pruned checkpoint that unmodified transformers loads, where every layer was cut alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..allocation.plan import PruningPlan
from ..architectures import KINDS, Site, get_architecture
from ..architectures.wrapping import check_in_memory, check_no_adapters
from ..cutting.surgery import pruned_config
from ..cutting.verification import (
    logits,
    probe_batch,
    share_of_scale,
    tolerance_of,
)
from ..files import folder_moved_into_place
from ..loading.offloading import input_device, is_offloaded, on_disk
from ..loading.saving import generation_config_as_it_is, save_offloaded
from ..loading.state import check_not_consumed
from ..models.per_layer import stock_config
from ..reconstruction.bias import added_parameters
from ..reconstruction.kinds import NONE
from ..request.config import PruningConfig
from ..runs.progress import one_step


# Families whose stock classes compute the same and may hold what a family's own cannot, tried in this order: Mistral's
# config takes any number of heads of any width.
SAME_COMPUTATION = {"llama": ("llama", "mistral")}

# The layout of a request whose plan can be exported so.
STOCK = "stock"

# What makes such a config compute the same.
VALUES_OF_OTHERS = {"mistral": {"sliding_window": None}}


def export_stock(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    overwrite: bool = False,
) -> Path:
    """Write a uniformly pruned model as a checkpoint of its stock family, or of one that computes the same.

    The folder appears whole or not at all, after what was written has been loaded again and its logits compared. Of a
    model whose layers are offloaded, one is in memory at a time.

    Args:
        model (`PreTrainedModel`): pruned, every layer alike; any task class.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): goes along, with its chat template.
        folder (`str` or `Path`): new or empty.
        overwrite (`bool`, defaults to `False`): replace a folder that is not empty.

    Raises:
        ValueError: where no stock class can hold the model, naming what is in the way.
        RuntimeError: where the stock model does not compute the same.
        FileExistsError: where the folder is not empty.
    """
    check_in_memory(model)
    check_not_consumed(model)
    check_no_adapters(model, "an export cannot hold")
    config, model_class = stock_form(model.config, get_architecture(model.config).pruned_class(model))
    probe = probe_batch(model, None)
    with folder_moved_into_place(folder, overwrite) as temporary:
        _write(model, config, model_class, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        with one_step("Verifying the exported model"):
            device = input_device(model)
            # Beside the pruned model there may be no room for another one.
            device_map = on_disk(model, device) if is_offloaded(model) else {"": device}
            written = model_class.from_pretrained(temporary, dtype=model.dtype, device_map=device_map)
            difference = share_of_scale(logits(model, probe), logits(written, probe))
            del written
        # Written so that NaN fails too.
        if not difference <= tolerance_of(model.dtype):
            raise RuntimeError(
                f"The stock {config.model_type} computes something else than the pruned model: logits differ by "
                f"{difference:.2g} of their scale. Nothing was written; please report it."
            )
    return Path(folder)


def _write(model: PreTrainedModel, config: PreTrainedConfig, model_class: Any, folder: Path) -> None:
    """Write the weights of a pruned model as those of a stock one."""
    offloaded = is_offloaded(model)
    if offloaded:
        with torch.device("meta"):
            stock = model_class(config)
        stock.config.dtype = model.dtype
    else:
        stock = model_class.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)
    if model.can_generate():
        stock.generation_config = model.generation_config
    if offloaded:
        save_offloaded(model, folder, written_as=stock)
    else:
        with generation_config_as_it_is(stock, folder):
            stock.save_pretrained(folder)


def stock_form(config: PreTrainedConfig, pruned_class: type[PreTrainedModel]) -> tuple[PreTrainedConfig, Any]:
    """Return the stock config and class that hold the weights of a pruned model.

    Args:
        config (`PreTrainedConfig`): of the pruned model.
        pruned_class (`type`): its class.

    Raises:
        ValueError: where there are none, naming what is in the way and the way out.
    """
    try:
        return _stock_form(config, pruned_class)
    except _NoStockForm as error:
        raise ValueError(
            f"{error} Load it with trust_remote_code=True instead, or prune what the stock format can hold "
            f"(layout='stock')."
        ) from error


class _NoStockForm(ValueError):
    """No stock class can hold a pruned model, for this reason."""


def _stock_form(config: PreTrainedConfig, pruned_class: type[PreTrainedModel]) -> tuple[PreTrainedConfig, Any]:
    if "per_layer_config" not in config.to_dict():
        raise ValueError(f"This {config.model_type} was not pruned here: unmodified transformers loads it as it is.")
    dense = stock_config(config)
    # What only a pruned config knows shows in the shapes.
    known = type(dense)().to_dict()
    layers = [{key: value for key, value in entry.items() if key in known} for entry in _entries(config)]
    for number, entry in enumerate(layers):
        if differing := [key for key in entry if entry[key] != layers[0][key]]:
            key = differing[0]
            raise ValueError(
                f"A stock checkpoint has layers of one size, and layer {number} has {key}={entry[key]} where layer 0 "
                f"has {layers[0][key]}. Prune with layout='stock' (--layout stock), or load it with the plugin."
            )
    shapes = _shapes(config, pruned_class)
    reasons = []
    for candidate, reason in _candidates(dense, layers[0]):
        if candidate is None:
            reasons.append(reason)
            continue
        model_class = _class_for(candidate, pruned_class)
        if model_class is None:
            reasons.append(f"{candidate.model_type} has no class for {pruned_class.__name__}")
            continue
        if (difference := _first_difference(shapes, _shapes(candidate, model_class))) is None:
            return candidate, model_class
        reasons.append(f"a stock {candidate.model_type} {difference}")
    raise _NoStockForm(f"No stock checkpoint can hold this {config.model_type}: {'; '.join(reasons)}.")


def check_stock_layout(
    model: PreTrainedModel, sites: list[Site], plan: PruningPlan, reconstruction: str = NONE
) -> None:
    """Raise `ValueError` where a stock checkpoint could not hold what a plan leaves of a model.

    Args:
        model (`PreTrainedModel`): the dense model.
        sites (`list[Site]`): all its sites.
        plan (`PruningPlan`): what they keep.
        reconstruction (`str`, defaults to `"none"`): kind of reconstruction that follows, which may add biases.
    """
    losing = [site for site in sites if len(plan.kept[site.key]) < site.num_units]
    with_bias = {site.kind for site in losing if added_parameters([site], reconstruction)}
    config = pruned_config(model, sites, plan.kept, with_bias)
    _stock_form(config, get_architecture(model.config).pruned_class(model))


def check_stock_request(model: PreTrainedModel, sites: list[Site], config: PruningConfig) -> None:
    """Raise `ValueError` where a stock checkpoint cannot hold half of the units of a kind that a request prunes."""
    for kind in config.resolved_kinds:
        plan = _halved(model, sites, config, kind)
        if (reason := _not_stock(model, sites, plan, config.reconstruction)) is None:
            continue
        if config.reconstruction != NONE and _not_stock(model, sites, plan, NONE) is None:
            raise ValueError(
                f"layout='stock' does not go with reconstruction={config.reconstruction!r} here. {reason} Set "
                f"reconstruction='least_squares' or reconstruction='none', which add no parameters."
            )
        others = [other for other in KINDS if other != kind and _allows(model, sites, config, other)]
        way_out = f"Set kinds={others}, or leave out layout." if others else "Leave out layout."
        raise ValueError(f"layout='stock' does not go with pruning {kind} here. {reason} {way_out}")


def _allows(model: PreTrainedModel, sites: list[Site], config: PruningConfig, kind: str) -> bool:
    """Whether a stock checkpoint can hold half of the units of `kind`."""
    return _not_stock(model, sites, _halved(model, sites, config, kind), config.reconstruction) is None


def _halved(model: PreTrainedModel, sites: list[Site], config: PruningConfig, kind: str) -> PruningPlan:
    """The plan that keeps half of the units of `kind` in every layer, and all others."""
    counts = {site.key: site.num_units for site in sites}
    kept = {site.key: _half(site) if site.kind == kind else list(range(site.num_units)) for site in sites}
    return PruningPlan(kept, counts, model.config.model_type, config.attention_unit)


def _not_stock(model: PreTrainedModel, sites: list[Site], plan: PruningPlan, reconstruction: str) -> str | None:
    """Why no stock checkpoint can hold what a plan leaves, or `None` where one can."""
    try:
        check_stock_layout(model, sites, plan, reconstruction)
    except ValueError as error:
        return str(error)
    return None


def _half(site: Site) -> list[int]:
    """The first half of the units of every group."""
    per_group = site.num_units // site.num_groups
    stay = range(max(1, per_group // 2))
    return [group * per_group + unit for group in range(site.num_groups) for unit in stay]


def _entries(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """What layers differ in, of every layer: a config writes down only what is not the same as in its own fields."""
    written: dict[str, dict] = config.to_dict()["per_layer_config"]
    keys = sorted({key for entry in written.values() for key in entry})
    return [{key: getattr(layer, key) for key in keys} for layer in config.per_layer_config]


def _candidates(dense: PreTrainedConfig, layer: dict[str, Any]) -> Iterator[tuple[PreTrainedConfig | None, str]]:
    """Yield stock configs at the sizes of `layer`; where a family's config refuses them, `None` and why."""
    for model_type in SAME_COMPUTATION.get(dense.model_type, (dense.model_type,)):
        config_class = type(AutoConfig.for_model(model_type))
        values = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
        try:
            others = {} if model_type == dense.model_type else VALUES_OF_OTHERS.get(model_type, {})
            yield config_class.from_dict({**values, **layer, **others}), ""
        except Exception as error:  # Whatever a config validates by, the sizes are not for it.
            yield None, f"{model_type} refuses these sizes ({' '.join(str(error).split())})"


def _class_for(config: PreTrainedConfig, pruned_class: type[PreTrainedModel]) -> Any:
    """The stock class of a config's family for the task of a pruned class."""
    _, is_task, task = pruned_class.__name__.partition("For")
    auto_class = getattr(transformers, f"AutoModel{is_task}{task}")
    return auto_class._model_mapping.get(type(config), None)


def _shapes(config: PreTrainedConfig, model_class: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _first_difference(wanted: dict[str, tuple[int, ...]], held: dict[str, tuple[int, ...]]) -> str | None:
    """Say where a stock model's parameters are not those of the pruned one."""
    for name in {**wanted, **held}:
        if wanted.get(name) != held.get(name):
            have = f"{' x '.join(map(str, held[name]))}" if name in held else "nothing"
            want = f"{' x '.join(map(str, wanted[name]))}" if name in wanted else "nothing"
            return f"has {have} at {name} where the pruned model has {want}"
    return None
