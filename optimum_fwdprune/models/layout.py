"""The layout of a family's decoder layers: the linears with heads and channels, and the config keys of their sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .experts import ExpertsLayout
from .skipped import SkippedAttention, SkippedMLP


# The sublayers of a decoder layer, which `skip` in its config may name.
ATTENTION, MLP = SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True)
class AttentionLayout:
    """Names of the linears of a self-attention module, and the config keys of its sizes.

    Args:
        module (`str`): name of the attention module inside the decoder layer.
        output (`str`): name of the output projection inside it.
        query (`str`): name of the query projection, if the three are separate. Without it and without `fused`, no
            single head can be removed, and `fixed` has the reason.
        key (`str`): name of the key projection.
        value (`str`): name of the value projection.
        fused (`str`): name of a single linear instead of these three.
        interleaved (`bool`, defaults to `False`): the fused rows are, for one KV head after the other, those of its
            query heads, of its key and of its value (BLOOM, Falcon) rather than all query rows, then all key rows,
            then all value rows (Phi-3).
        blocks (`int`, defaults to 1): number of equal blocks of the fused rows, each with the query, key and value
            rows of its own heads. All blocks must keep equally many heads. Every head has its own keys and values.
        head_dim (`str`, defaults to `"head_dim"`): attribute of the attention module that holds the size of a head.
        heads_key (`str`, defaults to `"num_attention_heads"`): config key of the number of query heads.
        kv_heads_key (`str`, *optional*, defaults to `"num_key_value_heads"`): config key of the number of KV heads;
            `None` where every head has its own keys and values.
        kept_heads_key (`str`, *optional*): config key for the original ids of the kept heads, for models whose heads
            differ by their position (ALiBi). The pruned attention module carries them as `kept_heads`.
        per_head (`tuple[str, ...]`, *optional*): parameters of the attention module with one number per query head,
            such as attention sinks.
        pruned_class (`type`, *optional*): subclass of the stock attention class that resized layers use instead, where
            the stock forward pass cannot compute with other sizes. Other attention classes of the family stay.
        norms (`tuple[str, ...]`, *optional*): norms inside the decoder layer that only the attention uses. They are
            removed with the attention. A norm that the MLP reads too is not named.
        skipped_class (`type`, defaults to `SkippedAttention`): class of the module that replaces a removed attention.
            It is built with the index of the layer.
        fixed (`str`, *optional*): the reason why no single head can be removed, as a clause. Errors and the table of
            supported families quote it.
        query_norms (`str`, *optional*): name, inside the attention module, of the norm of queries if it has weights
            for every head: a module whose weight is `[heads, head_dim]`, or a list with a norm for every head. Models
            without this module have no such norm.
        key_norms (`str`, *optional*): name of the norm of keys, if it has weights for every KV head.
    """

    module: str
    output: str
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str = ""
    interleaved: bool = False
    blocks: int = 1
    head_dim: str = "head_dim"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = "num_key_value_heads"
    kept_heads_key: str | None = None
    per_head: tuple[str, ...] = ()
    pruned_class: type[nn.Module] | None = None
    norms: tuple[str, ...] = ()
    skipped_class: type[nn.Module] = SkippedAttention
    fixed: str = ""
    query_norms: str = ""
    key_norms: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules of the attention inside the decoder layer, without norms."""
        return (self.module,)

    def skip_in(self, layer: nn.Module) -> None:
        """Remove the attention from a decoder layer."""
        layer_idx: Any = layer.get_submodule(self.module).layer_idx
        layer.set_submodule(self.module, self.skipped_class(layer_idx))

    def norm_sizes(self, config: Any) -> dict[str, int]:
        """Return the number of heads of every norm with weights by head, by its name inside the decoder layer."""
        heads = {self.query_norms: self.heads_key, self.key_norms: self.kv_heads_key or self.heads_key}
        return {f"{self.module}.{name}": getattr(config, key) for name, key in heads.items() if name}

    def linear_sizes(self, config: Any) -> dict[str, dict[str, Any]]:
        """Return how to resize every linear, by its name inside the decoder layer, at the sizes of its `config`."""
        if not (self.query or self.fused):
            return {f"{self.module}.{self.output}": {"add_bias": config.attention_output_bias}}
        query_features = getattr(config, self.heads_key) * config.head_dim
        key_features = getattr(config, self.kv_heads_key or self.heads_key) * config.head_dim
        if self.fused:
            source_features = {self.fused: query_features + 2 * key_features}
        else:
            source_features = {self.query: query_features, self.key: key_features, self.value: key_features}
        return {
            **{f"{self.module}.{name}": {"out_features": features} for name, features in source_features.items()},
            f"{self.module}.{self.output}": {"in_features": query_features, "add_bias": config.attention_output_bias},
        }


@dataclass(frozen=True)
class MLPLayout:
    """Names of the linears of an MLP inside the decoder layer, and the config key of its width.

    Args:
        sources (`tuple[str, ...]`): linears whose output rows are channels (`gate_proj` and `up_proj`, or `fc1`).
        output (`str`): the projection back to the hidden size.
        segments (`int`, defaults to 1): 2 if one source has gate rows and then up rows.
        width_key (`str`, defaults to `"intermediate_size"`): config key of the number of channels.
        pointwise (`bool`, defaults to `True`): whether a channel depends on its own row of every source only, and all
            sources read the same input; `False` if channels are normalized together in between.
        norms (`tuple[str, ...]`, *optional*): norms inside the decoder layer that only the MLP uses. They are removed
            with the MLP. A norm that the attention reads too is not named.
        skipped_class (`type`, defaults to `SkippedMLP`): class of the module that replaces a removed MLP.
    """

    sources: tuple[str, ...]
    output: str
    segments: int = 1
    width_key: str = "intermediate_size"
    pointwise: bool = True
    norms: tuple[str, ...] = ()
    skipped_class: type[nn.Module] = SkippedMLP

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules of the MLP inside the decoder layer, without norms: one module, or the linears if these
        are modules of the decoder layer itself."""
        owner, _, _ = self.output.rpartition(".")
        return (owner,) if owner else (*self.sources, self.output)

    def skip_in(self, layer: nn.Module) -> None:
        """Remove the MLP from a decoder layer."""
        *before, last = self.modules
        for name in before:
            setattr(layer, name, nn.Identity())
        layer.set_submodule(last, self.skipped_class())

    def linear_sizes(self, config: Any) -> dict[str, dict[str, Any]]:
        """Return how to resize every linear, by its name inside the decoder layer, at the sizes of its `config`."""
        width = getattr(config, self.width_key)
        return {
            **{name: {"out_features": self.segments * width} for name in self.sources},
            self.output: {"in_features": width, "add_bias": config.mlp_output_bias},
        }


def has_submodule(module: nn.Module, name: str) -> bool:
    """Return whether a module has a submodule with this name; none has the empty name."""
    return bool(name) and any(name == known for known, _ in module.named_modules())


def _no_attributes(config: Any) -> dict[str, Any]:
    return {}


def _always(config: Any) -> bool:
    return True


def _never(config: Any) -> bool:
    return False


def _none(config: Any) -> int:
    return 0


def _one(config: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class DecoderLayout:
    """The decoder layers of a family: everything that pruning and resizing need.

    Args:
        attention (`AttentionLayout`): the layout of heads.
        mlp (`MLPLayout`, *optional*): the layout of channels; of a family with experts, the layout of the dense MLPs
            that some layers may have instead.
        experts (`ExpertsLayout`, *optional*): the layout of experts, of a family that has them.
        layers (`str`, defaults to `"layers"`): name of the list of decoder layers inside the base model.
        attributes (`Callable[[PreTrainedConfig], dict[str, Any]]`, *optional*): function of the layer's own config
            that returns the attributes of modules with sizes, by their names inside the layer, such as
            `{"self_attn.num_heads": config.num_attention_heads}`.
        whole (`tuple[str, ...]`, *optional*): linears of a decoder layer whose sizes depend on neither heads nor
            channels. All others are named by `attention` and `mlp`.
        residual_adds_up (`Callable[[PreTrainedConfig], bool]`, *optional*): whether, under a config, the residual
            stream is the sum of the embeddings and the outputs of all projections, times `residual_multiplier`. It is
            not where the stream itself is normalized on its way. By default it always is.
        normalizes_stream (`Callable[[PreTrainedConfig], bool]`, *optional*): whether, under a config, a decoder layer
            normalizes the residual stream itself, as norms after the sum do. A layer without attention and MLP would
            still change the stream then, so that no whole layer can be removed, and a removed sublayer leaves its
            norms. By default no layer does.
        residual_multiplier (`Callable[[PreTrainedConfig], float]`, *optional*): the number by which the output of
            every projection is multiplied before it is added to the residual stream, under a config.
        output_norm (`bool`, defaults to `False`): whether the output of every projection is normalized before it is
            added to the residual stream (Gemma 2), by an RMS norm, which is then the last one of the `norms` of its
            sublayer. With `reconstruction_target="dense"`, the target of a projection is its output in the dense
            model, before the norm.
        shares_norms (`Callable[[PreTrainedConfig], bool]`, *optional*): whether, under a config, attention and MLP
            read the same norm, which then stays when one of them is removed. By default they never do.
        first_layers (`Callable[[PreTrainedConfig], int]`, *optional*): how many of the first decoder layers cannot be
            removed whole, under the config of the whole model: those after which something else is added to the
            residual stream by their number (DeepStack). By default none.
    """

    attention: AttentionLayout
    mlp: MLPLayout | None = None
    experts: ExpertsLayout | None = None
    layers: str = "layers"
    attributes: Callable[[Any], dict[str, Any]] = _no_attributes
    whole: tuple[str, ...] = ()
    residual_adds_up: Callable[[Any], bool] = _always
    normalizes_stream: Callable[[Any], bool] = _never
    residual_multiplier: Callable[[Any], float] = _one
    output_norm: bool = False
    shares_norms: Callable[[Any], bool] = _never
    first_layers: Callable[[Any], int] = _none

    def has_dense_target(self, config: Any) -> bool:
        """Return whether projections of a model with `config` can have the values of the dense model as targets."""
        return self.output_norm or self.residual_adds_up(config)

    def modules_of(self, kind: str, config: Any) -> tuple[str, ...]:
        """Return the names of the modules inside a decoder layer that are removed with its `"attention"` or its
        `"mlp"`, for a config."""
        part = self.sublayer(kind)
        stay = self.normalizes_stream(config) or self.shares_norms(config)
        return part.modules if stay else (*part.modules, *part.norms)

    def sublayer(self, kind: str) -> AttentionLayout | MLPLayout | ExpertsLayout:
        """Return the layout of the `"attention"` or the `"mlp"`, which is that of the experts if there are any."""
        if kind == ATTENTION:
            return self.attention
        part = self.experts or self.mlp
        assert part is not None, "A layout has channels, experts or both."
        return part

    def output_norm_of(self, kind: str) -> str:
        """Return the name, inside the decoder layer, of the norm of the output of its `"attention"` or its `"mlp"`, in
        a family with `output_norm`."""
        return self.sublayer(kind).norms[-1]

    def is_whole(self, name: str) -> bool:
        """Return whether the linear `name` of a decoder layer keeps its size, whatever heads and channels are left."""
        return name in self.whole or (self.experts is not None and name.startswith(f"{self.experts.module}."))


def grouped_attention(config: Any) -> dict[str, Any]:
    """Return the attribute of attention in most families: the number of query heads that share keys and values."""
    return {"self_attn.num_key_value_groups": config.num_attention_heads // config.num_key_value_heads}


# The names of LLaMA's modules, which most later families have, too.
LLAMA_LAYOUT = DecoderLayout(
    AttentionLayout(
        module="self_attn",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        output="o_proj",
        norms=("input_layernorm",),
    ),
    MLPLayout(sources=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj", norms=("post_attention_layernorm",)),
    attributes=lambda config: {**grouped_attention(config), "mlp.intermediate_size": config.intermediate_size},
)

# The same names, with norms of the outputs of attention and MLP alone (OLMo 2), or of inputs and outputs (Gemma 2).
NORMS_AFTER_LAYOUT = replace(
    LLAMA_LAYOUT,
    attention=replace(LLAMA_LAYOUT.attention, norms=("post_attention_layernorm",)),
    mlp=replace(LLAMA_LAYOUT.mlp, norms=("post_feedforward_layernorm",)),
    output_norm=True,
)
NORMS_AROUND_LAYOUT = replace(
    LLAMA_LAYOUT,
    attention=replace(LLAMA_LAYOUT.attention, norms=("input_layernorm", "post_attention_layernorm")),
    mlp=replace(LLAMA_LAYOUT.mlp, norms=("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    output_norm=True,
)

# The reason why no single head of some families can be removed.
NORM_OVER_HEADS = "its query and key norms take their mean over all heads, so that the kept heads would change."
