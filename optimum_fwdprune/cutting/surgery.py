"""Surgery: slicing tensors, and building the pruned model from them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..allocation.fitting import check_fits
from ..allocation.plan import PruningPlan
from ..architectures import (
    Site,
    SiteKey,
    as_stored,
    stored_axis,
)
from ..forward.gates import Projection
from ..loading.dispatching import OffloadFiles, Placement
from ..loading.offloading import read_parameter
from ..loading.state import forget_lengths, mark_consumed
from ..loading.subject import Subject
from ..runs.progress import progress
from .form import pruned_config, stays_stock, stock_pruned_config
from .renaming import Renaming


# The cuts of every parameter and buffer, by its name: (axis, int64 indices that are kept).
Cuts = dict[str, list[tuple[int, torch.Tensor]]]


def plan_cuts(sites: Iterable[Site], kept: Mapping[SiteKey, list[int]]) -> Cuts:
    """Convert the kept units of sites into kept indices along the axes of parameters and buffers."""
    cuts: Cuts = {}
    for site in sites:
        units = kept[site.key]
        if len(units) in (0, site.num_units):
            continue
        for coupling in site.couplings:
            index = coupling.kept_index(site.num_units, units)
            for name, _ in coupling.own_tensors():
                axis = stored_axis(coupling.module, name, coupling.axis)
                cuts.setdefault(f"{coupling.name}.{name}", []).append((axis, index))
        for norm in site.norms:
            # A list of norms loses modules, which are renamed.
            for parameter, _ in () if isinstance(norm.module, nn.ModuleList) else norm.module.named_parameters():
                cuts[f"{norm.name}.{parameter}"] = [(0, torch.tensor(norm.kept_heads(units)))]
    return cuts


def slice_tensor(name: str, tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Return the kept part of the parameter or buffer `name`: `tensor` itself if nothing is cut, and otherwise a new
    tensor."""
    for axis, index in cuts.get(name, ()):
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def empty_pruned_model(subject: Subject, kept: Mapping[SiteKey, list[int]], with_bias: set[str]) -> PreTrainedModel:
    """Build the pruned counterpart of a model without weights, on the meta device; the arguments are those of
    `pruned_config`. Its class is the stock class where that can hold what is left.

    Raises:
        ValueError: where the weights of the model do not match its class and config.
    """
    model = subject.model
    _check_tie(model)
    pruned_class: Any = subject.architecture.pruned_class(model)
    try:
        if stays_stock(subject, kept):
            pruned_class, config = type(model), stock_pruned_config(subject, kept)
        else:
            config = pruned_config(subject, kept, with_bias)
        with torch.device("meta"), no_init_weights():
            pruned = pruned_class(config)
        # Without initial values, transformers leaves out the ties too.
        pruned.tie_weights()
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
        if site.key not in projections or not projections[site.key].kept:
            continue
        projection = projections[site.key]
        if site.routing is not None:
            # Without a new weight, the model's own is cut.
            if projection.weight.numel():
                replaced[f"{site.routing.experts_name}.{site.routing.output_name}"] = projection.weight
        else:
            replaced[f"{site.output_name}.weight"] = as_stored(site.projection, projection.weight)
            if projection.bias is not None:
                replaced[f"{site.output_name}.bias"] = projection.bias
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
        kept = slice_tensor(name, buffer, cuts)
        setattr(pruned.get_submodule(parent), leaf, kept if inplace or kept is not buffer else buffer.clone())
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
