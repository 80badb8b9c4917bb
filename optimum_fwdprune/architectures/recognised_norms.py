"""What the norms and scales of an unsupported family's decoder layers are recognised to be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..models.layout import ATTENTION, MLP, NORM_OVER_HEADS, AttentionLayout, MLPLayout
from .dataflow import LayerFlow, follow_layer
from .module_attributes import HeadSizes


@dataclass(frozen=True)
class Surroundings:
    """The layouts of attention and MLP with their norms, and what is declared of the residual stream.

    Args:
        attention (`AttentionLayout`): the layout of heads.
        mlp (`MLPLayout`): the layout of channels.
        options (`dict[str, str]`): arguments of the `DecoderLayout` as expressions, by their names.
    """

    attention: AttentionLayout
    mlp: MLPLayout
    options: dict[str, str]


def recognise_surroundings(
    model: PreTrainedModel, layer: nn.Module, attention: AttentionLayout, mlp: MLPLayout, notes: list[str]
) -> Surroundings:
    """Recognise the norms of a decoder layer and how the outputs of its sublayers join the residual stream, by
    following a forward pass.

    Args:
        model (`PreTrainedModel`): a dense model on any device.
        layer (`Module`): one of its decoder layers.
        attention (`AttentionLayout`): the layout of its heads, without norms.
        mlp (`MLPLayout`): the layout of its channels, without norms.
        notes (`list[str]`): is extended by what to look at.
    """
    sources = {ATTENTION: (f"{attention.module}.{attention.fused or attention.query}",), MLP: mlp.sources}
    outputs = {ATTENTION: f"{attention.module}.{attention.output}", MLP: mlp.output}
    try:
        flow = follow_layer(model, layer, sources, outputs)
    except ValueError as error:
        notes.append(
            f"The forward pass of a decoder layer could not be followed ({error}). Its norms and scales are not "
            f"recognised: see norms, output_norm, residual_multiplier, residual_adds_up and normalizes_stream in the "
            f"documentation of the layouts."
        )
        return Surroundings(attention, mlp, {})
    norms = {kind: () if flow.normalizes_stream else flow.norms[kind] for kind in (ATTENTION, MLP)}
    options = _options(flow, model.config.get_text_config(), notes)
    return Surroundings(replace(attention, norms=norms[ATTENTION]), replace(mlp, norms=norms[MLP]), options)


def _options(flow: LayerFlow, config: Any, notes: list[str]) -> dict[str, str]:
    """Return the arguments of a layout that describe how outputs join the residual stream."""
    if flow.normalizes_stream:
        return {"residual_adds_up": "lambda config: False", "normalizes_stream": "lambda config: True"}
    if flow.output_norm:
        return {"output_norm": "True"}
    if not flow.adds_up:
        notes.append(
            "The outputs of attention and MLP are not added to the residual stream as they are, and not times one "
            "number either, so that reconstruction_target='dense' is refused for this family."
        )
        return {"residual_adds_up": "lambda config: False"}
    if flow.multiplier == 1:
        return {}
    values: Mapping[str, Any] = config.to_dict()
    keys = [key for key, value in values.items() if type(value) is float and value == flow.multiplier]
    keys.sort(key=lambda key: "resid" not in key)
    if keys:
        number = f"config.{keys[0]}"
    else:
        number = repr(flow.multiplier)
        notes.append(
            f"The outputs of attention and MLP are multiplied by {number}, which is no entry of the config. Write it "
            f"as an expression of the config in residual_multiplier if it differs between models."
        )
    return {"residual_multiplier": f"lambda config: {number}"}


def with_head_norms(attention: AttentionLayout, module: nn.Module, sizes: HeadSizes) -> AttentionLayout:
    """Return the layout of an attention with its norms of queries and keys that have weights for every head, or with
    the reason why no single head can be removed where such a norm takes its mean over all heads.

    Args:
        attention (`AttentionLayout`): the layout of heads.
        module (`Module`): the attention.
        sizes (`HeadSizes`): its sizes.
    """
    for name, norm in module.named_modules():
        weight = getattr(norm, "weight", None)
        is_norm = "norm" in type(norm).__name__.lower() and sizes.heads > 1
        if is_norm and weight is not None and weight.shape[0] in (sizes.query_features, sizes.key_features):
            return replace(attention, fixed=NORM_OVER_HEADS)
        heads = _heads_of_norm(norm)
        # The letter tells queries from keys where there are equally many.
        if heads == sizes.heads and (heads != sizes.kv_heads or re.match("q", name)):
            attention = replace(attention, query_norms=name)
        elif heads == sizes.kv_heads:
            attention = replace(attention, key_norms=name)
    return attention


def is_head_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm whose weight is `[heads, head_dim]`."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 2


def _heads_of_norm(norm: Any) -> int | None:
    """Return the number of heads that have weights of their own in a norm; `None` where none has."""
    if isinstance(norm, nn.ModuleList):
        return len(norm) if all("norm" in type(one).__name__.lower() for one in norm) else None
    return len(norm.weight) if is_head_norm(norm) else None
