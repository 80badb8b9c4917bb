"""The layout of a family that is not supported yet, recognised by the shapes, positions and names of its modules.

What cannot be told from these, such as the order of the rows of a fused projection, is guessed and noted. The check of
every pruning, masked against cut, tells whether a guess was right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..models.layout import AttentionLayout, MLPLayout
from .module_attributes import HeadSizes, head_dim_attribute, reads_config, size_attributes
from .recognised_norms import is_head_norm, recognise_surroundings, with_head_norms


# The letter in the name of a query, key or value projection: q_proj, to_k, wv, query, linear_v.
_QKV = re.compile(r"(?:^|[_w])([qkv])(?:$|_|uery|ey|alue)")

# Config keys of the number of channels, the usual ones first.
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim", "d_ff", "filter_size")


@dataclass(frozen=True)
class LinearShape:
    """Shape of a linear.

    Args:
        inputs (`int`): features that it reads.
        outputs (`int`): features that it writes.
    """

    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs} -> {self.outputs}"


@dataclass(frozen=True)
class RecognisedLayout:
    """What a decoder layer of an unsupported family was recognised to be.

    Args:
        layers (`str`): name of the list of decoder layers inside the base model.
        attention (`AttentionLayout`): where a layer keeps its heads.
        mlp (`MLPLayout`): where a layer keeps its channels.
        attributes (`dict[str, str]`): attributes that modules keep of their sizes -> expressions of a `config`.
        options (`dict[str, str]`): other arguments of the `DecoderLayout` as expressions, by their names.
        whole (`tuple[str, ...]`): linears whose sizes depend on neither.
        linears (`dict[str, LinearShape]`): all linears of a layer.
        width (`int`): channels of a layer.
        notes (`tuple[str, ...]`): what was guessed, and what to look at.
    """

    layers: str
    attention: AttentionLayout
    mlp: MLPLayout
    attributes: dict[str, str]
    options: dict[str, str]
    whole: tuple[str, ...]
    linears: dict[str, LinearShape]
    width: int
    notes: tuple[str, ...]

    def role(self, name: str) -> str:
        """Return what the linear `name` of a decoder layer does."""
        attention = {
            self.attention.output: "attention, writes to the residual stream",
            self.attention.query: "attention, queries",
            self.attention.key: "attention, keys",
            self.attention.value: "attention, values",
            self.attention.fused: "attention, queries, keys and values in one",
        }
        roles = {f"{self.attention.module}.{linear}": role for linear, role in attention.items() if linear}
        roles |= dict.fromkeys(self.mlp.sources, "MLP, channels")
        roles |= {self.mlp.output: "MLP, writes to the residual stream"}
        return roles.get(name, "whole: neither heads nor channels")


def recognise_layout(model: PreTrainedModel) -> RecognisedLayout:
    """Recognise the layout of a decoder-only model by names, shapes and a forward pass whose values do not matter, so
    that it may be on the meta device.

    Args:
        model (`PreTrainedModel`): a dense model of any family.

    Raises:
        ValueError: where a layer holds something else than attention and an MLP of linears, naming it.
    """
    config: Any = model.config.get_text_config()
    name, layers = _decoder_layers(model.base_model, config.num_hidden_layers)
    layer, linears = layers[0], _linears(layers[0])
    _check_layers(layers, linears)
    attention_name = _attention_name(layer, linears)
    attention_module = layer.get_submodule(attention_name)
    sizes = HeadSizes.of(attention_module, config)
    notes: list[str] = []
    attention = _attention_layout(attention_name, _linears(attention_module), sizes, notes)
    attention = replace(attention, head_dim=head_dim_attribute(attention_module, sizes))
    parts = (attention.output, attention.query, attention.key, attention.value, attention.fused)
    named = {f"{attention_name}.{linear}" for linear in parts}
    rest = {linear: shape for linear, shape in linears.items() if linear not in named}
    mlp, width = _mlp_layout(rest, sizes.hidden, config, notes)
    whole = tuple(linear for linear in rest if linear not in (*mlp.sources, mlp.output))
    _check_whole({linear: linears[linear] for linear in whole}, sizes, width)
    attention = with_head_norms(attention, attention_module, sizes)
    around = recognise_surroundings(model, layer, attention, mlp, notes)
    attributes = size_attributes(attention_module, attention_name, sizes.expression_of)
    attributes.pop(f"{attention_name}.{attention.head_dim}", None)
    if reads_config(attention_module, {"num_attention_heads", sizes.heads_key, "num_key_value_heads"}):
        attributes[f"{attention_name}.config"] = "config"
    mlp_name = mlp.output.rpartition(".")[0]
    attributes |= size_attributes(
        layer.get_submodule(mlp_name),
        mlp_name,
        lambda attribute, value: f"config.{mlp.width_key}" if value == width and "hidden" not in attribute else None,
    )
    return RecognisedLayout(
        layers=name,
        attention=around.attention,
        mlp=around.mlp,
        attributes=attributes,
        options=around.options,
        whole=whole,
        linears=linears,
        width=width,
        notes=tuple(notes),
    )


def _decoder_layers(base: nn.Module, number: int) -> tuple[str, nn.ModuleList]:
    """Return the list of decoder layers of a base model with its name: the largest of those with `number` modules."""
    lists = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number and _linears(module)
    ]
    if not lists:
        raise ValueError(
            f"{type(base).__name__} has no list of {number} modules with linears, as num_hidden_layers of its config "
            f"has it, so that its decoder layers are not recognised."
        )
    return max(lists, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters()))


def _linears(module: nn.Module) -> dict[str, LinearShape]:
    """Return the shapes of all linears inside a module, by their names in it."""
    return {
        name: _shape_of(linear) for name, linear in module.named_modules() if isinstance(linear, (nn.Linear, Conv1D))
    }


def _shape_of(linear: Any) -> LinearShape:
    if isinstance(linear, Conv1D):
        return LinearShape(linear.nx, linear.nf)
    return LinearShape(linear.in_features, linear.out_features)


def _check_layers(layers: nn.ModuleList, linears: Mapping[str, LinearShape]) -> None:
    """Raise `ValueError` where layers differ, or hold matrices that are no linears, such as experts."""
    for number, layer in enumerate(layers):
        if _linears(layer) != linears:
            raise ValueError(
                f"Layer {number} has other linears than layer 0, and a layout describes layers of one kind. Layer 0 "
                f"has {', '.join(linears)}; layer {number} has {', '.join(_linears(layer))}."
            )
    for name, parameter in layers[0].named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.dim() >= 2 and owner not in linears and not is_head_norm(layers[0].get_submodule(owner)):
            raise ValueError(
                f"{name} of a decoder layer is a tensor {list(parameter.shape)} that no linear holds (experts, or a "
                f"convolution), and a layout describes linears only."
            )


def _attention_name(layer: nn.Module, linears: Mapping[str, LinearShape]) -> str:
    """Return the name of the innermost module of a decoder layer with all linears of its attention."""

    def inside(name: str) -> list[str]:
        return [linear.removeprefix(f"{name}.") for linear in linears if linear.startswith(f"{name}.")]

    names = [
        name
        for name, module in layer.named_modules()
        if name
        and re.search("attn|attention", f"{name.rpartition('.')[2]} {type(module).__name__}", re.IGNORECASE)
        and not re.search("cross|encoder", name)
        and len(inside(name)) > 1
    ]
    if not names:
        raise ValueError(
            f"No module inside a {type(layer).__name__} is an attention with linears by its name or class. The layer "
            f"has the linears {', '.join(linears) or 'none'}."
        )
    name = names[0]
    while len(children := {linear.partition(".")[0] for linear in inside(name)}) == 1:
        name = f"{name}.{children.pop()}"
    return name


def _attention_layout(
    module: str, linears: Mapping[str, LinearShape], sizes: HeadSizes, notes: list[str]
) -> AttentionLayout:
    """Return the layout of an attention from the shapes of the linears inside it."""
    lettered = {linear: _QKV.search(linear.rpartition(".")[2]) for linear in linears}
    fused_features = sizes.query_features + 2 * sizes.key_features
    fused = [name for name, shape in linears.items() if shape == LinearShape(sizes.hidden, fused_features)]
    outputs = [
        name
        for name, shape in linears.items()
        if shape == LinearShape(sizes.query_features, sizes.hidden) and (fused or not lettered[name])
    ]
    if not outputs:
        raise _not_recognised(
            "no linear from all heads to the hidden size, which is neither q, k nor v", linears, sizes
        )
    shared: dict[str, Any] = {
        "module": module,
        "output": outputs[-1],
        "heads_key": sizes.heads_key,
        "kv_heads_key": sizes.kv_heads_key,
    }
    if fused:
        interleaved = sizes.kv_heads == sizes.heads and fused[0].rpartition(".")[2] == "query_key_value"
        order = "head by head" if interleaved else "queries, then keys, then values"
        notes.append(
            f"The rows of {fused[0]} are taken to be {order}. If pruning reports that masked and cut models differ, "
            f"set interleaved={not interleaved}."
        )
        return AttentionLayout(fused=fused[0], interleaved=interleaved, **shared)
    roles = {"q": sizes.query_features, "k": sizes.key_features, "v": sizes.key_features}
    separate = {}
    for letter, features in roles.items():
        candidates = [
            name
            for name, match in lettered.items()
            if match and match[1] == letter and linears[name] == LinearShape(sizes.hidden, features)
        ]
        if len(candidates) != 1:
            raise _not_recognised(f"{len(candidates)} linears {letter} with {features} features", linears, sizes)
        separate[letter] = candidates[0]
    return AttentionLayout(query=separate["q"], key=separate["k"], value=separate["v"], **shared)


def _not_recognised(what: str, linears: Mapping[str, LinearShape], sizes: HeadSizes) -> ValueError:
    listed = ", ".join(f"{name} ({shape})" for name, shape in linears.items())
    return ValueError(
        f"The attention is not recognised: it has {what}. It has {sizes.heads} query heads and {sizes.kv_heads} KV "
        f"heads of {sizes.head_dim} features, a hidden size of {sizes.hidden}, and the linears {listed}."
    )


def _mlp_layout(
    linears: Mapping[str, LinearShape], hidden: int, config: Any, notes: list[str]
) -> tuple[MLPLayout, int]:
    """Return the layout of the MLP from the linears that are no attention, and its number of channels."""
    for output in reversed([name for name, shape in linears.items() if shape.outputs == hidden]):
        width = linears[output].inputs
        reading = [name for name, shape in linears.items() if shape.inputs == hidden and name != output]
        for segments in (1, 2):
            sources = tuple(name for name in reading if linears[name].outputs == segments * width)
            if sources:
                key = _width_key(config, width, notes)
                return MLPLayout(sources, output, segments=segments, width_key=key), width
    listed = ", ".join(f"{name} ({shape})" for name, shape in linears.items()) or "none"
    raise ValueError(
        f"The MLP is not recognised: no linears lead from the hidden size of {hidden} to channels and back. The "
        f"linears beside the attention are {listed}."
    )


def _width_key(config: Any, width: int, notes: list[str]) -> str:
    """Return the config key of the number of channels: one that has this number, or one to give it."""
    values = config.to_dict()
    keys = [config.attribute_map.get(key, key) for key in _WIDTH_KEYS]
    for key in (*keys, *(key for key in values if re.search("ffn|inner|intermediate|mlp", key))):
        if values.get(key) == width and not isinstance(values[key], bool):
            return key
    key = next((key for key in keys if key in values and values[key] is None), "intermediate_size")
    notes.append(f"No entry of the config has the {width} channels of the MLP; the pruned config sets {key} to them.")
    return key


def _check_whole(linears: Mapping[str, LinearShape], sizes: HeadSizes, width: int) -> None:
    """Raise `ValueError` where a linear that stays whole has a size that follows heads or channels."""
    for name, shape in linears.items():
        features = {shape.inputs, shape.outputs} - {sizes.hidden}
        if features & {sizes.heads, sizes.kv_heads, sizes.query_features, sizes.key_features, width}:
            raise ValueError(
                f"{name} ({shape}) of a decoder layer is a projection neither of the attention nor of the MLP, and "
                f"its size follows heads or channels, so that it would have to be cut with them. A layout cannot "
                f"declare that."
            )
