"""Masks over units that are applied in forward passes, without changing weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..architectures import Coupling, Site, SiteKey
from ..runs.devices import compute_device
from .routing import gate_experts, replace_experts


@contextmanager
def gated(sites: Iterable[Site], masks: Mapping[SiteKey, torch.Tensor]) -> Iterator[None]:
    """Within the context, multiply the inputs of the projections of sites by the gates of their units.

    Experts with a gate of 0 are not chosen by their router, so that other experts take their place. A site whose gates
    are all 0 is removed: the output of its projection is 0, including the bias, and so is that of its mixture.

    Args:
        sites (iterable of `Site`): the sites of the model.
        masks (mapping of site key to `Tensor`): gates, float or bool, `[num_units]` for all sequences, or
            `[batch_size, num_units]` with a mask per sequence. Other sites are not changed.

    Raises:
        ValueError: where the shape of a mask does not fit its site or a batch.
        RuntimeError: on exit without another error, where a forward pass ran and bypassed a gated projection.
    """
    handles, calls = [], {}
    try:
        for site in sites:
            if site.key in masks:
                calls[site.key] = 0
                handles += _gates(site, masks[site.key], calls)
                if not (is_left := masks[site.key].bool().any(-1)).all():
                    handles.append(site.output.register_forward_hook(_silencer(site, is_left)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if any(calls.values()) and not all(calls.values()):
        bypassed = next(key for key, count in calls.items() if count == 0)
        raise RuntimeError(
            f"The forward pass bypassed the module with the gates of site {bypassed}, so that these had no effect."
        )


def _gates(site: Site, mask: torch.Tensor, calls: dict[SiteKey, int]) -> list[RemovableHandle]:
    if mask.shape[-1] != site.num_units or mask.dim() > 2:
        raise ValueError(
            f"The mask of the {site} has shape {tuple(mask.shape)}; it must be [{site.num_units}] or "
            f"[batch_size, {site.num_units}]."
        )
    if site.routing is not None:
        return gate_experts(site, mask, partial(_count, calls, site.key))
    return [site.output.register_forward_pre_hook(_gate(site, mask, calls))]


def _count(calls: dict[SiteKey, int], key: SiteKey) -> None:
    calls[key] += 1


def _gate(site: Site, mask: torch.Tensor, calls: dict[SiteKey, int]):
    # Gates of features are computed once, outside the forward pass.
    features = site.feature_mask(mask)
    rounded = features.to(site.projection.weight.dtype)
    # In 16 bit a gate of 1.001 would round to 1. Such gates keep their dtype, and the product is rounded instead. The
    # comparison runs on the device of the mask, mostly the CPU, so that it does not wait for another device.
    if torch.equal(rounded.to(features.dtype), features):
        features = rounded
    features = features.to(compute_device(site.projection))

    def hook(_module, args):
        inputs = args[0]
        gates = features.to(inputs.device)
        calls[site.key] += 1
        if gates.dim() == 1:
            return ((inputs * gates).to(inputs.dtype),)
        batch_size = len(gates)
        if inputs.shape[0] % batch_size or (inputs.dim() > 2 and inputs.shape[0] != batch_size):
            raise ValueError(
                f"{batch_size} masks do not fit a batch of {inputs.shape[0]}: pass one mask per sequence."
            )
        return (_per_sequence(inputs, gates),)

    return hook


def _silencer(site: Site, is_left: torch.Tensor):
    """Return a hook that sets the output of a site to 0 in sequences without units of the site."""
    gates = is_left.to(site.weight.dtype).to(compute_device(site.output))

    def silenced(output: torch.Tensor) -> torch.Tensor:
        return _per_sequence(output, gates.to(output.device)[:, None]) if gates.dim() else torch.zeros_like(output)

    def hook(_module, _args, output):
        # Some mixtures return the weights of their experts, too.
        return (silenced(output[0]), *output[1:]) if isinstance(output, tuple) else silenced(output)

    return hook


def _per_sequence(values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Multiply the features of every sequence by its gates, `[batch_size, features]` or `[batch_size, 1]`."""
    # OPT calls its second MLP linear with `[batch * tokens, features]`; this view fits both layouts.
    product = values.reshape(len(gates), -1, values.shape[-1]) * gates[:, None, :]
    return product.to(values.dtype).view_as(values)


@dataclass(frozen=True)
class Projection:
    """New parameters of an output projection, and of the sources of its features if these change too.

    The output of a projection without units is 0, and so is that of a mixture without experts.

    Args:
        kept (`list[int]`): the kept units.
        weight (`Tensor[out_features, kept features]`): the weight in the projection's dtype. For experts it is that of
            their output projections as the model stores it, the kept experts first, or empty where none changes.
        bias (`Tensor[out_features]`, *optional*): the bias; `None` where the projection has and needs none.
        sources (mapping of `str` to `Tensor[kept rows, ...]`): all weights and biases of the linears that compute the
            features, by the names of the parameters, if these change; otherwise empty.
    """

    kept: list[int]
    weight: torch.Tensor
    bias: torch.Tensor | None
    sources: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Projection:
        """Return the projection with `change` applied to every tensor."""
        bias = None if self.bias is None else change(self.bias)
        sources = {name: change(tensor) for name, tensor in self.sources.items()}
        return Projection(self.kept, change(self.weight), bias, sources)


def kept_projection(site: Site, kept: list[int]) -> Projection:
    """Return the unchanged projection of `site` for the units `kept`; without units, it has no bias."""
    if site.routing is not None:
        return Projection(kept, site.weight.new_empty(0), None)
    bias = site.projection.bias if kept else None
    return Projection(kept, site.projection.weight[:, site.kept_features(kept)], bias)


def kept_sources(site: Site, kept: list[int]) -> dict[str, torch.Tensor]:
    """Return the unchanged parameters of the sources of `site` for the units `kept`, by their names."""
    parameters = {}
    for source in site.sources:
        for name, value in source.parameters():
            parameters[f"{source.name}.{name}"] = value[source.kept_index(site.num_units, kept).to(value.device)]
    return parameters


@contextmanager
def replaced_projections(sites: Iterable[Site], replacements: Mapping[SiteKey, Projection]) -> Iterator[None]:
    """Within the context, use new weights in projections and their sources, as a reconstructed model does.

    Args:
        sites (iterable of `Site`): the sites of the model.
        replacements (mapping of site key to `Projection`): the new weights. Other sites are not changed.
    """
    handles = []
    try:
        for site in sites:
            if site.key in replacements:
                new = replacements[site.key]
                if site.routing is not None:
                    handles += _kept_experts(site, new)
                    continue
                handles += [_replaced_source(site, source, new) for source in site.sources if new.sources]
                columns = site.feature_mask(site.unit_mask(new.kept)).nonzero().flatten().to(new.weight.device)

                def hook(_module, args, _output, new=new, columns=columns):
                    return F.linear(args[0].index_select(-1, columns), new.weight, new.bias)

                handles.append(site.projection.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept_experts(site: Site, new: Projection) -> list[RemovableHandle]:
    """Let a router choose from the kept experts only, and these use their new output projections; without any, the
    output of the mixture is 0."""
    if not new.kept:
        return [site.output.register_forward_hook(_silencer(site, torch.tensor(False)))]
    handles = [] if len(new.kept) == site.num_units else gate_experts(site, site.unit_mask(new.kept), lambda: None)
    return handles + (replace_experts(site, new.kept, new.weight) if new.weight.numel() else [])


def _replaced_source(site: Site, source: Coupling, new: Projection) -> RemovableHandle:
    """Use the new weights for the kept rows of a source. The other rows are not read any more."""
    weight, bias = new.sources[f"{source.name}.weight"], new.sources.get(f"{source.name}.bias")
    rows = source.kept_index(site.num_units, new.kept).to(weight.device)

    def hook(_module, args, output):
        return output.index_copy(-1, rows, F.linear(args[0], weight, bias))

    # Other hooks on the linear must receive the new outputs.
    return source.linear.register_forward_hook(hook, prepend=True)
