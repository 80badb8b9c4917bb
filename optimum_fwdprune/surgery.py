"""Cutting: the one place where tensors are sliced, and where the pruned model is put together from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import ATTENTION, MLP, Site, SiteKey, get_architecture
from .gates import Projection
from .plan import PruningPlan


# Parameter name -> the cuts to make: (axis, int64 positions that stay).
Cuts = dict[str, list[tuple[int, torch.Tensor]]]


def plan_cuts(sites: Iterable[Site], kept: Mapping[SiteKey, list[int]]) -> Cuts:
    """Translate what sites keep into positions to keep along the axes of named parameters."""
    cuts: Cuts = {}
    for site in sites:
        units = kept[site.key]
        if len(units) == site.num_units:
            continue
        for coupling in site.couplings:
            index = coupling.kept_index(site.num_units, units)
            for parameter, _ in coupling.parameters():
                cuts.setdefault(f"{coupling.name}.{parameter}", []).append((coupling.axis, index))
    return cuts


def slice_tensor(name: str, tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Return what is left of the parameter `name`: `tensor` itself where nothing is cut, else a new tensor."""
    for axis, index in cuts.get(name, ()):
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def pruned_config(
    model: PreTrainedModel, sites: list[Site], kept: Mapping[SiteKey, list[int]], with_bias: set[str]
) -> PreTrainedConfig:
    """Build the config of the pruned model.

    Args:
        model (`PreTrainedModel`): the dense model.
        sites (`list[Site]`): all its sites.
        kept (mapping of site key to `list[int]`): units that they keep.
        with_bias (`set[str]`): kinds whose projections have a bias after pruning where the family has none.
    """
    architecture = get_architecture(model.config)
    values = model.config.to_dict()
    for key in ("model_type", "per_layer_config", "auto_map", "quantization_config", "transformers_version"):
        values.pop(key, None)
    values["architectures"] = [architecture.pruned_class(model).__name__]
    # A second pruning keeps the biases that the first one added.
    values["attention_output_bias"] = values.get("attention_output_bias", False) or ATTENTION in with_bias
    values["mlp_output_bias"] = values.get("mlp_output_bias", False) or MLP in with_bias
    config = architecture.config_class.from_dict(
        {**values, "per_layer_config": architecture.layer_sizes(model, sites, dict(kept))}
    )
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = model.config._name_or_path
    return config


def check_resident(model: PreTrainedModel) -> None:
    """Raise `ValueError` where a parameter of `model` is offloaded, so that there is nothing in memory to cut."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is offloaded. Load the model without disk or CPU offload, for example with device_map=None."
            )


@torch.no_grad()
def prune_model(
    model: PreTrainedModel,
    sites: list[Site],
    plan: PruningPlan,
    projections: Mapping[SiteKey, Projection] | None = None,
    inplace: bool = True,
) -> PreTrainedModel:
    """Return the pruned model.

    Its class is the pruned counterpart of the model's class. Parameters move one by one, so that the peak is the dense
    model and one tensor.

    Args:
        model (`PreTrainedModel`): the dense model. With `inplace` it is consumed: its cut tensors are freed and the
            rest is shared with the result.
        sites (`list[Site]`): all its sites.
        plan (`PruningPlan`): what they keep.
        projections (mapping of site key to `Projection`, *optional*): reconstructed output projections.
        inplace (`bool`, defaults to `True`): `False` leaves the dense model whole and copies what both need.

    Raises:
        ValueError: where the plan does not fit the model.
    """
    projections = projections or {}
    plan.check_matches(sites, model.config.model_type)
    architecture = get_architecture(model.config)
    by_key = {site.key: site for site in sites}
    with_bias = {
        kind
        for (layer, kind), projection in projections.items()
        if projection.bias is not None and by_key[(layer, kind)].projection.bias is None
    }
    config = pruned_config(model, sites, plan.kept, with_bias)
    with torch.device("meta"):
        pruned = architecture.pruned_class(model)(config)

    cuts = plan_cuts(sites, plan.kept)
    replaced = {}
    for key, projection in projections.items():
        name = by_key[key].projection_name
        replaced[f"{name}.weight"] = projection.weight
        if projection.bias is not None:
            replaced[f"{name}.bias"] = projection.bias
    for name, parameter in list(model.named_parameters()):
        value = replaced.pop(name, None)
        if value is None:
            value = slice_tensor(name, parameter.data, cuts)
        if not inplace and value.data_ptr() == parameter.data_ptr():
            value = value.clone()
        _set_parameter(pruned, name, value, parameter.requires_grad)
        if inplace and value.shape != parameter.shape:
            parameter.data = parameter.data.new_empty(0)
    for name, value in replaced.items():
        _set_parameter(pruned, name, value, requires_grad=True)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(pruned.get_submodule(parent), leaf, buffer if inplace else buffer.clone())
    pruned.tie_weights()  # type: ignore[operator]
    left = [name for name, parameter in pruned.named_parameters() if parameter.is_meta]
    if left:
        raise ValueError(f"{type(pruned).__name__} has the parameters {', '.join(left)}, which the dense model lacks.")

    pruned.train(model.training)
    if model.can_generate():
        pruned.generation_config = model.generation_config
    device_map: Any = getattr(model, "hf_device_map", None)
    if device_map and len(set(device_map.values())) > 1:
        from accelerate import dispatch_model

        pruned = dispatch_model(pruned, device_map=device_map)
    return pruned


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor, requires_grad: bool) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected = getattr(module, leaf).shape
    if value.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} after the cut; the pruned class expects {tuple(expected)}."
        )
    setattr(module, leaf, nn.Parameter(value, requires_grad=requires_grad))
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = value.shape
