"""Resizing a decoder layer: its linears get the sizes in its own config, and sublayers that it skips are removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .layout import ATTENTION, SUBLAYERS, DecoderLayout, has_submodule


# Classes of linears that a decoder layer may hold; GPT-2 stores the weights of its own transposed.
LINEARS = (nn.Linear, Conv1D)


def resize_layer(layer: nn.Module, layout: DecoderLayout, config: PreTrainedConfig) -> None:
    """Replace the linears of a decoder layer by empty ones with the sizes in its own config, and remove the sublayers
    that the config names in `skip`.

    Args:
        layer (`Module`): a decoder layer of the stock class, of any sizes; changed in place.
        layout (`DecoderLayout`): the layout of its heads and channels.
        config (`PreTrainedConfig`): config of this layer, one of `per_layer_config`.

    Raises:
        ValueError: where the layer has a linear that the layout does not name.
    """
    skipped = getattr(config, "skip", ())
    sizes: dict[str, dict[str, Any]] = {}
    for kind in SUBLAYERS:
        if kind in skipped:
            _skip(kind, layer, layout, config)
        else:
            sizes |= layout.sublayer(kind).linear_sizes(config)
    for name, changes in sizes.items():
        layer.set_submodule(name, _resized(layer.get_submodule(name), **changes))
    for name, heads in {} if ATTENTION in skipped else layout.attention.norm_sizes(config).items():
        if has_submodule(layer, name):
            _resize_norm(layer, name, heads)
    for name, module in layer.named_modules():
        if isinstance(module, LINEARS) and name not in sizes and not layout.is_whole(name):
            raise ValueError(
                f"{name} is a linear of a {type(layer).__name__}, and the layout of its family does not name it. Name "
                f"it as a source, or in `whole` if its size depends on neither heads nor channels."
            )
    if ATTENTION not in skipped:
        _resize_per_head(layer.get_submodule(layout.attention.module), layout, config)
    pruned_class, attention = layout.attention.pruned_class, layer.get_submodule(layout.attention.module)
    if pruned_class is not None and type(attention) is pruned_class.__base__:
        attention.__class__ = pruned_class
    for name, value in layout.attributes(config).items():
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, value)


def _skip(kind: str, layer: nn.Module, layout: DecoderLayout, config: PreTrainedConfig) -> None:
    part = layout.sublayer(kind)
    part.skip_in(layer)
    for name in layout.modules_of(kind, config):
        if name in part.norms and has_submodule(layer, name):
            layer.set_submodule(name, nn.Identity())


def _resize_norm(layer: nn.Module, name: str, heads: int) -> None:
    """Give a norm with weights by head, or a list of norms, the weights of fewer heads."""
    norm: Any = layer.get_submodule(name)
    if isinstance(norm, nn.ModuleList):
        layer.set_submodule(name, norm[:heads])
        return
    for parameter_name, parameter in norm.named_parameters():
        setattr(norm, parameter_name, nn.Parameter(parameter.new_empty(heads, *parameter.shape[1:])))


def _resize_per_head(attention: nn.Module, layout: DecoderLayout, config: PreTrainedConfig) -> None:
    """Replace the parameters of an attention with a number per head by empty ones of the size in the config."""
    for name in layout.attention.per_head:
        parameter = getattr(attention, name)
        resized = parameter.new_empty(getattr(config, layout.attention.heads_key))
        setattr(attention, name, nn.Parameter(resized, requires_grad=parameter.requires_grad))


def _resized(
    linear: Any, in_features: int | None = None, out_features: int | None = None, add_bias: bool = False
) -> nn.Module:
    """Return an empty linear with other sizes than `linear`, of the same class, device and dtype."""
    transposed = isinstance(linear, Conv1D)
    stored_inputs, stored_outputs = (linear.nx, linear.nf) if transposed else (linear.in_features, linear.out_features)
    in_features = stored_inputs if in_features is None else in_features
    out_features = stored_outputs if out_features is None else out_features
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    if transposed:
        with torch.device("meta"):
            # It has a bias whatever happens.
            resized = Conv1D(out_features, in_features)
        return resized.to(like["dtype"]).to_empty(device=like["device"])
    return type(linear)(in_features, out_features, bias=linear.bias is not None or add_bias, **like)
