"""How the parameters of every family are written to GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..architectures import as_linear, head_counts
from ..models.layout import ATTENTION, MLP, DecoderLayout
from . import gguf_fields as fields
from .gguf_tensors import interleaved, separated, with_scaled_queries


if TYPE_CHECKING:
    from gguf import GGUFWriter

    Fields = tuple[Callable[[GGUFWriter, Any], None], ...]


class LayerSizes(NamedTuple):
    """Sizes of a layer, determined from its weights; 0 where it has no attention or no MLP. With experts, every one of
    them has so many channels."""

    heads: int
    kv_heads: int
    channels: int
    experts: int = 0

    def __str__(self) -> str:
        of_experts = f" in each of {self.experts} experts" if self.experts else ""
        return f"{self.heads} heads, {self.kv_heads} KV heads and {self.channels} channels{of_experts}"

    @classmethod
    def of(cls, layer: nn.Module, layout: DecoderLayout, skipped: Collection[str] = ()) -> LayerSizes:
        """Return the sizes of a decoder layer of a family with this layout, without the sublayers in `skipped`."""
        heads, kv_heads = (0, 0) if ATTENTION in skipped else head_counts(layout.attention, layer)
        if MLP in skipped:
            return cls(heads, kv_heads, 0)
        if layout.experts is not None and layout.experts.is_in(layer):
            mixture = layer.get_submodule(layout.experts.module)
            experts: Any = mixture.get_submodule(layout.experts.experts)
            # [experts, hidden, channels], or [experts, channels, hidden].
            width = experts.down_proj.shape[1 if getattr(experts, "is_transposed", False) else 2]
            return cls(heads, kv_heads, width, len(experts.down_proj))
        assert layout.mlp is not None
        return cls(heads, kv_heads, as_linear(layer.get_submodule(layout.mlp.output)).in_features)


@dataclass(frozen=True)
class GGUFFamily:
    """How the parameters of a family differ in llama.cpp, and the hyperparameters of its files.

    Args:
        rotates_pairs (`bool`): whether llama.cpp rotates pairs of neighbouring features; transformers rotates halves.
        adds_one (`bool`): the weights of norms are added to one in transformers, and used as they are in llama.cpp.
        scales_queries (`str`, *optional*): end of the name of the parameter that takes the factor by which llama.cpp
            scales queries otherwise than transformers.
        own_output (`bool`): whether llama.cpp needs an output matrix where it is tied to the embeddings.
        fields (`tuple[Callable, ...]`): functions of the writer and the config that add the hyperparameters other than
            sizes, such as those of norms and rotary embeddings.
    """

    rotates_pairs: bool = False
    adds_one: bool = False
    scales_queries: str | None = None
    own_output: bool = False
    fields: Fields = field(default=(fields.rms_norm, fields.head_dim, fields.rope))

    def convert(
        self, name: str, values: torch.Tensor, sizes: LayerSizes | None, config: Any, layout: DecoderLayout
    ) -> torch.Tensor:
        """Return a parameter in llama.cpp's form.

        Args:
            name (`str`): name of the parameter in transformers.
            values (`Tensor`): the parameter.
            sizes (`LayerSizes`, *optional*): sizes of its layer; `None` outside of the layers.
            config (`PreTrainedConfig`): stock config of the model.
            layout (`DecoderLayout`): where the layers of the family keep their heads.
        """
        if self.adds_one and name.endswith("norm.weight"):
            values = values.float() + 1
        if sizes is None:
            return values
        attention = layout.attention
        if attention.fused:
            is_fused = attention.interleaved and attention.fused in name
            return separated(values, sizes.heads, sizes.kv_heads) if is_fused else values
        if self.scales_queries is not None and name.endswith(self.scales_queries):
            values = with_scaled_queries(values, config, sizes.heads)
        if self.rotates_pairs and f".{attention.query}." in name:
            return interleaved(values, sizes.heads)
        if self.rotates_pairs and f".{attention.key}." in name:
            return interleaved(values, sizes.kv_heads)
        return values


# By the `model_type` of the stock config. Families that are not listed are written as they are.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "ministral", "arcee", "mixtral"), GGUFFamily(rotates_pairs=True)),
    "gemma": GGUFFamily(adds_one=True),
    "gemma2": GGUFFamily(
        adds_one=True,
        scales_queries=".q_proj.weight",
        fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.sliding_windows, fields.soft_caps),
    ),
    "gemma3_text": GGUFFamily(
        adds_one=True,
        scales_queries=".q_norm.weight",
        fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.sliding_windows),
    ),
    "olmo": GGUFFamily(rotates_pairs=True, fields=(fields.fixed_layer_norm, fields.rope, fields.clamp)),
    "olmo2": GGUFFamily(own_output=True),
    "olmo3": GGUFFamily(
        own_output=True, fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.sliding_windows)
    ),
    **dict.fromkeys(
        ("granite", "granitemoe"),
        GGUFFamily(rotates_pairs=True, fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.granite_scales)),
    ),
    "qwen2_moe": GGUFFamily(fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.shared_expert)),
    "gpt_oss": GGUFFamily(fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.sliding_windows)),
    "smollm3": GGUFFamily(rotates_pairs=True),
    "cohere": GGUFFamily(fields=(fields.layer_norm, fields.head_dim, fields.rope, fields.logit_scale)),
    "cohere2": GGUFFamily(
        fields=(fields.layer_norm, fields.head_dim, fields.rope, fields.logit_scale, fields.sliding_windows)
    ),
    "nemotron": GGUFFamily(adds_one=True, own_output=True, fields=(fields.layer_norm, fields.head_dim, fields.rope)),
    **dict.fromkeys(("bloom", "gpt2"), GGUFFamily(fields=(fields.layer_norm,))),
    **dict.fromkeys(("falcon", "starcoder2"), GGUFFamily(fields=(fields.layer_norm, fields.rope))),
    "phi": GGUFFamily(own_output=True, fields=(fields.layer_norm, fields.rope)),
    **dict.fromkeys(
        ("gpt_neox", "stablelm"),
        GGUFFamily(own_output=True, fields=(fields.layer_norm, fields.rope, fields.parallel_blocks)),
    ),
}


def family_of(model_type: str) -> GGUFFamily:
    """Return how the parameters of a family are written."""
    return FAMILIES.get(model_type, GGUFFamily())
