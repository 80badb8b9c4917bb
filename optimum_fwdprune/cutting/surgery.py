"""Surgery: slicing tensors, and building the pruned model from them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..allocation.fitting import check_fits
from ..allocation.plan import PruningPlan
from ..architectures import (
    Site,
    SiteKey,
    as_stored,
    layers_left,
    stored_axis,
)
from ..architectures.depth import values_of_layers
from ..forward.gates import Projection
from ..loading.dispatching import OffloadFiles, Placement
from ..loading.offloading import read_parameter
from ..loading.state import forget_lengths, mark_consumed
from ..loading.subject import Subject
from ..models.per_layer import attention_implementations
from ..request.choices import UnitKind
from ..runs.progress import progress
from .renaming import Renaming


# The cuts of every parameter, by its name: (axis, int64 indices that are kept).
Cuts = dict[str, list[tuple[int, torch.Tensor]]]


def plan_cuts(sites: Iterable[Site], kept: Mapping[SiteKey, list[int]]) -> Cuts:
    """Convert the kept units of sites into kept indices along the axes of parameters."""
    cuts: Cuts = {}
    for site in sites:
        units = kept[site.key]
        if len(units) in (0, site.num_units):
            continue
        for coupling in site.couplings:
            index = coupling.kept_index(site.num_units, units)
            for parameter, _ in coupling.parameters():
                axis = stored_axis(coupling.linear, parameter, coupling.axis)
                cuts.setdefault(f"{coupling.name}.{parameter}", []).append((axis, index))
        for norm in site.norms:
            # A list of norms loses modules, which are renamed.
            for parameter, _ in () if isinstance(norm.module, nn.ModuleList) else norm.module.named_parameters():
                cuts[f"{norm.name}.{parameter}"] = [(0, torch.tensor(norm.kept_heads(units)))]
    return cuts


def slice_tensor(name: str, tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Return the kept part of the parameter `name`: `tensor` itself if nothing is cut, and otherwise a new tensor."""
    for axis, index in cuts.get(name, ()):
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def pruned_config(subject: Subject, kept: Mapping[SiteKey, list[int]], with_bias: set[str]) -> PreTrainedConfig:
    """Build the config of the pruned model.

    Args:
        subject (`Subject`): the dense model with all its sites.
        kept (mapping of site key to `list[int]`): the units that the sites keep.
        with_bias (`set[str]`): kinds of sites whose projections get a bias that the family does not have.
    """
    model, architecture = subject.model, subject.architecture
    values = _values_of(subject.text_config)
    # A second pruning keeps the biases that the first one added.
    values["attention_output_bias"] = values.get("attention_output_bias", False) or UnitKind.ATTENTION in with_bias
    values["mlp_output_bias"] = values.get("mlp_output_bias", False) or UnitKind.MLP in with_bias
    values |= values_of_layers(subject.text_config, layers_left(kept))
    values["per_layer_config"] = architecture.layer_sizes(model, subject.sites, dict(kept))
    if subject.text_config is not model.config:
        text_config = {**values, "model_type": architecture.pruned_text_type(subject.text_config)}
        values = _values_of(model.config) | {"text_config": text_config}
    values["architectures"] = [architecture.pruned_class(model).__name__]
    config = architecture.config_class.from_dict(values)
    config._attn_implementation = attention_implementations(model.config)
    config._name_or_path = model.config._name_or_path
    return config


def _values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the values of a config that a pruned one takes over."""
    own = ("model_type", "per_layer_config", "auto_map", "quantization_config", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in own}


def empty_pruned_model(subject: Subject, kept: Mapping[SiteKey, list[int]], with_bias: set[str]) -> PreTrainedModel:
    """Build the pruned counterpart of a model without weights, on the meta device; the arguments are those of
    `pruned_config`.

    Raises:
        ValueError: where the weights of the model do not match its class and config.
    """
    model = subject.model
    _check_tie(model)
    pruned_class: Any = subject.architecture.pruned_class(model)
    try:
        config = pruned_config(subject, kept, with_bias)
        with torch.device("meta"):
            pruned = pruned_class(config)
    except Exception as error:  # Stock classes raise many kinds of errors for sizes that contradict each other.
        raise ValueError(
            f"The config of this {type(model).__name__} describes no model: {type(error).__name__}: {error} Set in "
            f"model.config what the modules have, or load the model again."
        ) from error
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    _check_names(model, pruned, Renaming(subject, kept))
    return pruned


def _check_tie(model: PreTrainedModel) -> None:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    # Addresses of offloaded weights do not show whether they are tied.
    if head is None or embeddings is None or head.weight.is_meta or embeddings.weight.is_meta:
        return
    # A class that never ties has no such keys, whatever its config is.
    tied = bool(model.get_expanded_tied_weights_keys())  # type: ignore[operator]
    shared = head.weight.data_ptr() == embeddings.weight.data_ptr()
    if tied != shared:
        raise ValueError(
            f"The config has tie_word_embeddings={tied}, and the head and the embeddings are "
            f"{'one tensor' if shared else 'two tensors'}. Set model.config.tie_word_embeddings to {shared} first."
        )


def _check_names(model: PreTrainedModel, pruned: PreTrainedModel, renaming: Renaming) -> None:
    known = {name for name, _ in pruned.named_parameters(remove_duplicate=False)} | {None}
    added = [name for name, _ in model.named_parameters() if renaming.after(name) not in known]
    if added:
        raise ValueError(
            f"The model has {len(added)} parameters that {type(pruned).__name__} lacks, such as {added[0]}. Remove "
            f"the modules that were added to {type(model).__name__}, or merge them into its weights, before pruning."
        )


def replaced_parameters(sites: Iterable[Site], projections: Mapping[SiteKey, Projection]) -> dict[str, torch.Tensor]:
    """Return the parameters of reconstructed projections, and of refitted sources, by their names."""
    replaced = {}
    for site in sites:
        # A projection without units is removed.
        if site.key in projections and projections[site.key].kept:
            projection = projections[site.key]
            replaced[f"{site.projection_name}.weight"] = as_stored(site.projection, projection.weight)
            if projection.bias is not None:
                replaced[f"{site.projection_name}.bias"] = projection.bias
            replaced |= projection.sources
            for source in site.sources if projection.sources else ():
                name = f"{source.name}.weight"
                replaced[name] = as_stored(source.linear, replaced[name])
    return replaced


@torch.no_grad()
def prune_model(
    subject: Subject,
    plan: PruningPlan,
    projections: Mapping[SiteKey, Projection] | None = None,
    inplace: bool = True,
) -> PreTrainedModel:
    """Return the pruned model.

    Its class is the pruned counterpart of the model's class, and accelerate distributes it over devices, memory and
    disk like the dense model. Parameters move one by one, so that the peak is the dense model, `projections`, and one
    tensor. Offloaded parameters move first, so that the model is unchanged if the disk is full.

    Args:
        subject (`Subject`): the dense model with all its sites. With `inplace` it is consumed: tensors that are cut or
            replaced are freed, and the result shares the others. Offloaded tensors stay offloaded.
        plan (`PruningPlan`): the units that the sites keep.
        projections (mapping of site key to `Projection`, *optional*): reconstructed output projections, with their
            sources if these change.
        inplace (`bool`, defaults to `True`): `False` keeps the dense model, and copies tensors that both models need.

    Raises:
        ValueError: where the plan does not fit the model, or its weights do not match its class and config; the model
            is unchanged.
        PlacementError: where the pruned model cannot be distributed; it is an attribute of the error.
    """
    model, sites, projections = subject.model, subject.sites, projections or {}
    renaming = Renaming(subject, plan.kept)
    placement = Placement.of(model)
    check_fits(plan, subject)
    with_bias = {
        site.kind
        for site in sites
        if site.key in projections and projections[site.key].bias is not None and site.projection.bias is None
    }
    pruned = empty_pruned_model(subject, plan.kept, with_bias)
    cuts = plan_cuts(sites, plan.kept)
    replaced = replaced_parameters(sites, projections)
    parameters = dict(model.named_parameters())
    # New biases are on the device of their weight, and are frozen if it is.
    added = {name: parameters[f"{name.rpartition('.')[0]}.weight"] for name in replaced if name not in parameters}
    files = placement.files()
    in_order = sorted((parameters | added).items(), key=lambda item: not item[1].is_meta)
    for name, parameter in progress(in_order, "Cutting", unit="tensor"):
        new_name = renaming.after(name)
        if new_name is None:
            if inplace and not parameter.is_meta:
                mark_consumed(model)
                parameter.data = parameter.data.new_empty(0)
            continue
        value = replaced.get(name)
        if value is None:
            value = slice_tensor(name, read_parameter(model, name), cuts)
        if parameter.is_meta:
            value = _offloaded(value, (name, new_name), placement, files, inplace)
            set_parameter(pruned, new_name, value, parameter.requires_grad)
            continue
        value = value.to(parameter.device)
        if not inplace and value.data_ptr() == parameter.data_ptr():
            value = value.clone()
        set_parameter(pruned, new_name, value, parameter.requires_grad)
        if inplace and name in parameters and value.data_ptr() != parameter.data_ptr():
            mark_consumed(model)
            parameter.data = parameter.data.new_empty(0)
    for name, buffer in model.named_buffers():
        if (new_name := renaming.after(name)) is None:
            continue
        parent, _, leaf = new_name.rpartition(".")
        buffer = read_parameter(model, name) if buffer.is_meta else buffer
        setattr(pruned.get_submodule(parent), leaf, buffer if inplace else buffer.clone())
    # Buffers of the dense model may depend on the length of earlier inputs.
    forget_lengths(pruned)
    pruned.tie_weights()  # type: ignore[operator]
    stored = files.names if files is not None else set()
    left = [name for name, parameter in pruned.named_parameters() if parameter.is_meta and name not in stored]
    if left:
        raise ValueError(f"{type(pruned).__name__} has the parameters {', '.join(left)}, which the dense model lacks.")

    return placement.renamed(renaming.after).apply(pruned.train(model.training), files)


def _offloaded(
    value: torch.Tensor, names: tuple[str, str], placement: Placement, files: OffloadFiles | None, inplace: bool
) -> torch.Tensor:
    """Move the kept part of an offloaded parameter, whose `names` are those before and after, to the place of the
    whole parameter: to disk or to memory."""
    name, new_name = names
    owner = name if name in placement.on_disk else f"{name.rpartition('.')[0]}.weight"
    if files is not None and owner in placement.on_disk:
        files.add(new_name, value)
        return value.to("meta")
    return value.cpu() if inplace else value.cpu().clone()


def share_tensors(model: PreTrainedModel, counterpart: PreTrainedModel) -> None:
    """Set the parameters and buffers of `counterpart` to those of `model`, without copies."""
    for name, parameter in model.named_parameters():
        set_parameter(counterpart, name, parameter.data, requires_grad=False)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(counterpart.get_submodule(parent), leaf, buffer)
    counterpart.tie_weights()  # type: ignore[operator]
    counterpart.train(model.training)


def set_parameter(model: nn.Module, name: str, value: torch.Tensor, requires_grad: bool) -> None:
    """Set the parameter `name` of `model` to a value of the shape that its class expects.

    Raises:
        ValueError: where the shape differs.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    expected = getattr(module, leaf).shape
    if value.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} after the cut, and the pruned class expects {tuple(expected)}."
        )
    setattr(module, leaf, nn.Parameter(value, requires_grad=requires_grad))
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = value.shape
