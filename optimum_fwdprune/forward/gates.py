"""Masks over units, applied on the fly. The weights are never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..architectures import Coupling, Site, SiteKey
from ..runs.devices import compute_device


@contextmanager
def gated(sites: Iterable[Site], masks: Mapping[SiteKey, torch.Tensor]) -> Iterator[None]:
    """Multiply the inputs of the projections of sites by the gates of their units while the context is open.

    A site whose gates are all closed writes nothing, not even the bias of its projection: it is removed.

    Args:
        sites (iterable of `Site`): the sites of the model.
        masks (mapping of site key to `Tensor`): gates, float or bool, `[num_units]` for all sequences alike, or
            `[batch_size, num_units]` for one mask per sequence. Sites that are not named stay open.

    Raises:
        ValueError: where a mask does not fit its site, or a batch.
        RuntimeError: on a clean exit, where a forward pass ran but bypassed a gated projection.
    """
    handles, calls = [], {}
    try:
        for site in sites:
            if site.key in masks:
                calls[site.key] = 0
                handles.append(site.projection.register_forward_pre_hook(_gate(site, masks[site.key], calls)))
                if not (is_left := masks[site.key].bool().any(-1)).all():
                    handles.append(site.projection.register_forward_hook(_silencer(site, is_left)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if any(calls.values()) and not all(calls.values()):
        bypassed = next(key for key, count in calls.items() if count == 0)
        raise RuntimeError(f"The forward pass bypassed the projection of site {bypassed}, so its gates had no effect.")


def _gate(site: Site, mask: torch.Tensor, calls: dict[SiteKey, int]):
    if mask.shape[-1] != site.num_units or mask.dim() > 2:
        raise ValueError(
            f"The mask of the {site} has shape {tuple(mask.shape)}; it must be [{site.num_units}] or "
            f"[batch_size, {site.num_units}]."
        )
    # Spread over features once, outside the forward pass.
    features = site.feature_mask(mask)
    rounded = features.to(site.projection.weight.dtype)
    # In 16 bit a gate of 1.001 would round to 1; such gates stay as they are, and the product is rounded instead. The
    # comparison runs where the mask is, mostly on the CPU, so that it does not wait for another device.
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
                f"{batch_size} masks do not fit a batch of {inputs.shape[0]}: give one mask per sequence."
            )
        return (_per_sequence(inputs, gates),)

    return hook


def _silencer(site: Site, is_left: torch.Tensor):
    """Return a hook that lets the projection of a site write zeros in the sequences in which no unit of it is left."""
    gates = is_left.to(site.projection.weight.dtype).to(compute_device(site.projection))

    def hook(_module, _args, output):
        return _per_sequence(output, gates.to(output.device)[:, None]) if gates.dim() else torch.zeros_like(output)

    return hook


def _per_sequence(values: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Multiply the features of every sequence by its gates, `[batch_size, features]` or `[batch_size, 1]`."""
    # OPT hands its second MLP linear `[batch * tokens, features]`; the view serves both layouts.
    product = values.reshape(len(gates), -1, values.shape[-1]) * gates[:, None, :]
    return product.to(values.dtype).view_as(values)


@dataclass(frozen=True)
class Projection:
    """New parameters of one output projection, and of the sources of its features where these are new too. One without
    units writes zeros.

    Args:
        kept (`list[int]`): kept units.
        weight (`Tensor[out_features, kept features]`): in the projection's dtype.
        bias (`Tensor[out_features]`, *optional*): `None` where the projection has none and needs none.
        sources (mapping of `str` to `Tensor[kept rows, ...]`): all weights and biases of the linears that make the
            features, by the names of the parameters, where these are new; otherwise empty.
    """

    kept: list[int]
    weight: torch.Tensor
    bias: torch.Tensor | None
    sources: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Projection:
        """Return it with `change` applied to every tensor."""
        bias = None if self.bias is None else change(self.bias)
        sources = {name: change(tensor) for name, tensor in self.sources.items()}
        return Projection(self.kept, change(self.weight), bias, sources)


def kept_projection(site: Site, kept: list[int]) -> Projection:
    """Return the projection of `site` as it is, on the features of the units `kept`, without a bias if none stays."""
    bias = site.projection.bias if kept else None
    return Projection(kept, site.projection.weight[:, site.kept_features(kept)], bias)


def kept_sources(site: Site, kept: list[int]) -> dict[str, torch.Tensor]:
    """Return the parameters of the sources of `site` as they are, the rows that stay, by their names."""
    parameters = {}
    for source in site.sources:
        for name, value in source.parameters():
            parameters[f"{source.name}.{name}"] = value[source.kept_index(site.num_units, kept).to(value.device)]
    return parameters


@contextmanager
def replaced_projections(sites: Iterable[Site], replacements: Mapping[SiteKey, Projection]) -> Iterator[None]:
    """Let projections and their sources compute with other weights, as if they had been reconstructed already.

    Args:
        sites (iterable of `Site`): the sites of the model.
        replacements (mapping of site key to `Projection`): sites that are not named stay as they are.
    """
    handles = []
    try:
        for site in sites:
            if site.key in replacements:
                new = replacements[site.key]
                handles += [_replaced_source(site, source, new) for source in site.sources if new.sources]
                columns = site.feature_mask(site.unit_mask(new.kept)).nonzero().flatten().to(new.weight.device)

                def hook(_module, args, _output, new=new, columns=columns):
                    return F.linear(args[0].index_select(-1, columns), new.weight, new.bias)

                handles.append(site.projection.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replaced_source(site: Site, source: Coupling, new: Projection) -> RemovableHandle:
    """Let the rows of a source that stay compute with their new weights. The other rows are not read any more."""
    weight, bias = new.sources[f"{source.name}.weight"], new.sources.get(f"{source.name}.bias")
    rows = source.kept_index(site.num_units, new.kept).to(weight.device)

    def hook(_module, args, output):
        return output.index_copy(-1, rows, F.linear(args[0], weight, bias))

    # Other hooks on the linear must see the new outputs.
    return source.linear.register_forward_hook(hook, prepend=True)
