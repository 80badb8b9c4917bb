"""The families that llama.cpp supports: what it calls them, and what its code can and cannot hold of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
    """Sizes of a layer, determined from its weights; 0 where it has no attention or no MLP."""

    heads: int
    kv_heads: int
    channels: int

    @classmethod
    def of(cls, layer: nn.Module, layout: DecoderLayout, skipped: Collection[str] = ()) -> LayerSizes:
        """Return the sizes of a decoder layer of a family with this layout, without the sublayers in `skipped`."""
        heads, kv_heads = (0, 0) if ATTENTION in skipped else head_counts(layout.attention, layer)
        if MLP in skipped:
            return cls(heads, kv_heads, 0)
        assert layout.mlp is not None
        return cls(heads, kv_heads, as_linear(layer.get_submodule(layout.mlp.output)).in_features)


@dataclass(frozen=True)
class GGUFFamily:
    """A family in llama.cpp.

    Args:
        uniform (`str`): llama.cpp's architecture for layers of equal size.
        per_layer (`str`, *optional*): its architecture for layers of different sizes; `None` where there is none.
        all_heads (`bool`): llama.cpp takes the heads together to be as wide as the hidden size, so that the model must
            have all its heads.
        output_biases (`bool`): whether the projections that write to the residual stream can have biases.
        requires (`dict[str, Any]`): values of the config that llama.cpp's code takes for granted, by their keys.
        rotates_pairs (`bool`): whether llama.cpp rotates pairs of neighbouring features; transformers rotates halves.
        adds_one (`bool`): the weights of norms are added to one in transformers, and used as they are in llama.cpp.
        scales_queries (`str`, *optional*): end of the name of the parameter that takes the factor by which llama.cpp
            scales queries otherwise than transformers.
        own_output (`bool`): whether llama.cpp needs an output matrix where it is tied to the embeddings.
        slides (`bool`): whether llama.cpp computes sliding windows.
        activations (`tuple[str, ...]`): activations of the MLP that llama.cpp computes.
        ropes (`tuple[str, ...]`): types of rotary embeddings that it computes; none where the family has none.
        fields (`tuple[Callable, ...]`): functions of the writer and the config that add the hyperparameters other than
            sizes, such as those of norms and rotary embeddings.
    """

    uniform: str
    per_layer: str | None = None
    all_heads: bool = False
    output_biases: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)
    rotates_pairs: bool = False
    adds_one: bool = False
    scales_queries: str | None = None
    own_output: bool = False
    slides: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    ropes: tuple[str, ...] = ("default", "linear")
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


LLAMA = GGUFFamily("llama", "deci", output_biases=True, rotates_pairs=True, ropes=("default", "linear", "llama3"))
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

# By the `model_type` of the stock config.
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": GGUFFamily("qwen2", all_heads=True),
    "qwen3": GGUFFamily("qwen3"),
    "gemma2": GGUFFamily(
        "gemma2",
        adds_one=True,
        scales_queries=".q_proj.weight",
        slides=True,
        activations=GELU_TANH,
        fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.sliding_windows, fields.soft_caps),
    ),
    "gemma3_text": GGUFFamily(
        "gemma3",
        adds_one=True,
        scales_queries=".q_norm.weight",
        slides=True,
        activations=GELU_TANH,
        fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.sliding_windows, fields.no_soft_caps),
    ),
    "phi3": GGUFFamily("phi3", all_heads=True, ropes=("default", "linear", "longrope")),
    "olmo2": GGUFFamily("olmo2", all_heads=True, own_output=True),
    "granite": GGUFFamily(
        "granite",
        output_biases=True,
        rotates_pairs=True,
        fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.granite_scales),
    ),
    "starcoder2": GGUFFamily(
        "starcoder2",
        all_heads=True,
        output_biases=True,
        requires={"use_bias": True},
        activations=GELU_TANH,
        fields=(fields.layer_norm, fields.rope),
    ),
    "gpt_neox": GGUFFamily(
        "gptneox",
        all_heads=True,
        output_biases=True,
        requires={"attention_bias": True},
        own_output=True,
        # llama.cpp approximates GELU with tanh, as it does for every model.
        activations=("gelu", *GELU_TANH),
        fields=(fields.layer_norm, fields.rope, fields.parallel_blocks),
    ),
    "bloom": GGUFFamily(
        "bloom", all_heads=True, output_biases=True, activations=(), ropes=(), fields=(fields.layer_norm,)
    ),
    "gemma": GGUFFamily("gemma", adds_one=True, activations=("gelu", *GELU_TANH)),
    "arcee": GGUFFamily("arcee", rotates_pairs=True, activations=("relu2",)),
    "cohere": GGUFFamily(
        "command-r",
        all_heads=True,
        fields=(fields.layer_norm, fields.head_dim, fields.rope, fields.logit_scale, fields.head_norms_of_command_r),
    ),
    "cohere2": GGUFFamily(
        "cohere2",
        all_heads=True,
        slides=True,
        fields=(fields.layer_norm, fields.head_dim, fields.rope, fields.logit_scale, fields.sliding_windows),
    ),
    "smollm3": GGUFFamily(
        "smollm3",
        rotates_pairs=True,
        fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.layers_without_rope),
    ),
    "exaone4": GGUFFamily(
        "exaone4", all_heads=True, ropes=("default", "linear", "llama3"), requires={"sliding_window": None}
    ),
    "olmo": GGUFFamily(
        "olmo", all_heads=True, rotates_pairs=True, fields=(fields.fixed_layer_norm, fields.rope, fields.clamp)
    ),
    "olmo3": GGUFFamily(
        "olmo2",
        all_heads=True,
        own_output=True,
        slides=True,
        fields=(fields.rms_norm, fields.head_dim, fields.rope, fields.sliding_windows),
    ),
    "glm": GGUFFamily("chatglm", all_heads=True),
    "glm4": GGUFFamily("glm4"),
    "seed_oss": GGUFFamily("seed_oss"),
    "ernie4_5": GGUFFamily("ernie4_5"),
    "hunyuan_v1_dense": GGUFFamily("hunyuan-dense"),
    "gpt2": GGUFFamily(
        "gpt2", all_heads=True, output_biases=True, activations=GELU_TANH, ropes=(), fields=(fields.layer_norm,)
    ),
    "falcon": GGUFFamily(
        "falcon",
        all_heads=True,
        requires={"alibi": False, "parallel_attn": True, "bias": False},
        activations=("gelu", *GELU_TANH),
        fields=(fields.layer_norm, fields.rope),
    ),
    "nemotron": GGUFFamily(
        "nemotron",
        all_heads=True,
        adds_one=True,
        output_biases=True,
        own_output=True,
        activations=("relu2",),
        fields=(fields.layer_norm, fields.head_dim, fields.rope),
    ),
    "stablelm": GGUFFamily(
        "stablelm", all_heads=True, own_output=True, fields=(fields.layer_norm, fields.rope, fields.parallel_blocks)
    ),
    "phi": GGUFFamily(
        "phi2",
        all_heads=True,
        output_biases=True,
        own_output=True,
        requires={"qk_layernorm": False},
        activations=("gelu", *GELU_TANH),
        fields=(fields.layer_norm, fields.rope),
    ),
}

_NO_CODE = "llama.cpp has no code for this family."
_PARTS = "llama.cpp reads the language model and the vision model from two files, which the export does not write."

_MIXTURES = (
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
)

# Why there is no export of other families, as sentences.
REASONS = {
    **dict.fromkeys(_MIXTURES, "The export does not write mixtures of experts."),
    **dict.fromkeys(("codegen", "gptj", "helium", "opt"), _NO_CODE),
    **dict.fromkeys(("gemma3", "llava", "qwen2_5_vl", "qwen3_vl"), _PARTS),
    "apertus": "The export does not write the parameters of its activation (xIELU).",
    "ministral3": "The export does not write its rotary embeddings (YaRN) and its scaling of queries by position.",
}
