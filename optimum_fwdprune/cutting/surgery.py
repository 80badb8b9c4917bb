"""Cutting: the one place where tensors are sliced, and where the pruned model is put together from them."""

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
from ..request.choices import UnitKind
from ..runs.progress import progress
from .renaming import Renaming


# Parameter name -> the cuts to make: (axis, int64 positions that stay).
Cuts = dict[str, list[tuple[int, torch.Tensor]]]


def plan_cuts(sites: Iterable[Site], kept: Mapping[SiteKey, list[int]]) -> Cuts:
    """Translate what sites keep into positions to keep along the axes of named parameters."""
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
    return cuts


def slice_tensor(name: str, tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Return what is left of the parameter `name`: `tensor` itself where nothing is cut, else a new tensor."""
    for axis, index in cuts.get(name, ()):
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def pruned_config(subject: Subject, kept: Mapping[SiteKey, list[int]], with_bias: set[str]) -> PreTrainedConfig:
    """Build the config of the pruned model.

    Args:
        subject (`Subject`): the dense model with all its sites.
        kept (mapping of site key to `list[int]`): units that they keep.
        with_bias (`set[str]`): kinds whose projections have a bias after pruning where the family has none.
    """
    model, architecture = subject.model, subject.architecture
    values = model.config.to_dict()
    for key in ("model_type", "per_layer_config", "auto_map", "quantization_config", "transformers_version"):
        values.pop(key, None)
    values["architectures"] = [architecture.pruned_class(model).__name__]
    # A second pruning keeps the biases that the first one added.
    values["attention_output_bias"] = values.get("attention_output_bias", False) or UnitKind.ATTENTION in with_bias
    values["mlp_output_bias"] = values.get("mlp_output_bias", False) or UnitKind.MLP in with_bias
    values |= values_of_layers(model.config, layers_left(kept))
    config = architecture.config_class.from_dict(
        {**values, "per_layer_config": architecture.layer_sizes(model, subject.sites, dict(kept))}
    )
    config._attn_implementation = model.config._attn_implementation
    config._name_or_path = model.config._name_or_path
    return config


def empty_pruned_model(subject: Subject, kept: Mapping[SiteKey, list[int]], with_bias: set[str]) -> PreTrainedModel:
    """Build the pruned counterpart of a model without weights, on the meta device; the arguments are those of
    `pruned_config`.

    Raises:
        ValueError: where the weights of the model are not those that its class and config say.
    """
    model = subject.model
    _check_tie(model)
    pruned_class: Any = subject.architecture.pruned_class(model)
    try:
        config = pruned_config(subject, kept, with_bias)
        with torch.device("meta"):
            pruned = pruned_class(config)
    except Exception as error:  # Of many classes: what a stock class makes of sizes that contradict each other.
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
    # Offloaded weights are not told apart by where they lie.
    if head is None or embeddings is None or head.weight.is_meta or embeddings.weight.is_meta:
        return
    # A class that never ties has no such keys, whatever its config says.
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
            f"The model has {len(added)} parameters that {type(pruned).__name__} lacks, {added[0]} the first. Remove "
            f"what added them to {type(model).__name__}, or merge it into the weights, and prune then."
        )


def replaced_parameters(sites: Iterable[Site], projections: Mapping[SiteKey, Projection]) -> dict[str, torch.Tensor]:
    """Return the parameters of reconstructed projections, and of refitted sources, by their names."""
    replaced = {}
    for site in sites:
        # A projection without units is gone.
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
    disk as the dense model is. Parameters move one by one, so that the peak is the dense model, `projections`, and one
    tensor. Offloaded parameters move first: if the disk is full, the model is still whole.

    Args:
        subject (`Subject`): the dense model with all its sites. With `inplace` it is consumed: its tensors that were
            cut or replaced are freed and the rest is shared with the result. What is offloaded stays there.
        plan (`PruningPlan`): what they keep.
        projections (mapping of site key to `Projection`, *optional*): reconstructed output projections, with their
            sources where these are new.
        inplace (`bool`, defaults to `True`): `False` leaves the dense model whole and copies what both need.

    Raises:
        ValueError: where the plan does not fit the model, or its weights are not those that its class and config say;
            the model is whole then.
        PlacementError: where the pruned model cannot be distributed; the error has it.
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
    # Biases that the dense model lacks lie where the weight does; a frozen one stays frozen.
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
    # The dense model may have read longer text than the pruned one.
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
    """Put what is left of an offloaded parameter, with its names before and after, where the whole of it is offloaded
    to."""
    name, new_name = names
    owner = name if name in placement.on_disk else f"{name.rpartition('.')[0]}.weight"
    if files is not None and owner in placement.on_disk:
        files.add(new_name, value)
        return value.to("meta")
    return value.cpu() if inplace else value.cpu().clone()


def share_tensors(model: PreTrainedModel, counterpart: PreTrainedModel) -> None:
    """Give `counterpart` the parameters and buffers of `model` themselves."""
    for name, parameter in model.named_parameters():
        set_parameter(counterpart, name, parameter.data, requires_grad=False)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(counterpart.get_submodule(parent), leaf, buffer)
    counterpart.tie_weights()  # type: ignore[operator]
    counterpart.train(model.training)


def set_parameter(model: nn.Module, name: str, value: torch.Tensor, requires_grad: bool) -> None:
    """Give the parameter `name` of `model` a value of the shape that its class expects.

    Raises:
        ValueError: where the shape is another.
    """
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
