"""The families that llama.cpp supports: their names there, their sizes, and the order of their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .gguf_tensors import interleaved, separated


if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer, determined from its weights."""

    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class GGUFFamily:
    """A family in llama.cpp.

    Args:
        uniform (`str`): llama.cpp's architecture for layers of equal size.
        per_layer (`str`, *optional*): its architecture for layers of different sizes; `None` where there is none.
        all_heads (`bool`): whether the model must have all its heads.
        output_biases (`bool`): whether the projections that write to the residual stream can have biases.
    """

    uniform: str
    per_layer: str | None = None
    all_heads: bool = False
    output_biases: bool = True

    def sizes(self, layer: nn.Module, config: Any) -> LayerSizes:
        """Return the sizes of a decoder layer."""
        raise NotImplementedError

    def head_dim(self, config: Any) -> int:
        """Return the number of features of a head."""
        raise NotImplementedError

    def context(self, config: Any) -> int:
        """Return the context length that the model was trained with."""
        raise NotImplementedError

    def add_fields(self, writer: GGUFWriter, config: Any) -> None:
        """Add the family's hyperparameters other than sizes, such as those of its norms and rotary embeddings."""
        raise NotImplementedError

    def convert(self, name: str, rows: torch.Tensor, sizes: LayerSizes) -> torch.Tensor:
        """Return a parameter of a layer with its rows in llama.cpp's order; `name` is its name in transformers."""
        return rows

    def more_tensors(self, config: Any) -> dict[str, torch.Tensor]:
        """Return tensors of the file that are no parameters of the model, by their names in the file."""
        return {}


@dataclass(frozen=True)
class Llama(GGUFFamily):
    """LLaMA, and families whose modules have the same names.

    Args:
        interleaves (`bool`): whether llama.cpp rotates pairs of neighbouring features; transformers rotates halves.
    """

    interleaves: bool = False

    def sizes(self, layer: Any, config: Any) -> LayerSizes:
        attention = layer.self_attn
        return LayerSizes(
            heads=attention.q_proj.out_features // config.head_dim,
            kv_heads=attention.k_proj.out_features // config.head_dim,
            channels=layer.mlp.down_proj.in_features,
        )

    def head_dim(self, config: Any) -> int:
        return config.head_dim

    def context(self, config: Any) -> int:
        return config.max_position_embeddings

    def add_fields(self, writer: GGUFWriter, config: Any) -> None:
        import gguf

        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope["rope_theta"])
        kind = rope.get("rope_type", "default")
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif kind not in ("default", "llama3"):
            raise ValueError(
                f"Rotary embeddings of type {kind!r} cannot be exported; default, linear and llama3 can be."
            )

    def convert(self, name: str, rows: torch.Tensor, sizes: LayerSizes) -> torch.Tensor:
        if not self.interleaves:
            return rows
        if ".q_proj." in name:
            return interleaved(rows, sizes.heads)
        return interleaved(rows, sizes.kv_heads) if ".k_proj." in name else rows

    def more_tensors(self, config: Any) -> dict[str, torch.Tensor]:
        """Return the factors `[head_dim / 2]` that LLaMA 3 divides its rotary frequencies by."""
        rope = config.rope_parameters
        if rope.get("rope_type") != "llama3":
            return {}
        plain = rope["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return {"rope_freqs.weight": plain / scaled}


@dataclass(frozen=True)
class Bloom(GGUFFamily):
    """BLOOM, which must have all its heads because llama.cpp computes the ALiBi slopes from their number."""

    def sizes(self, layer: Any, config: Any) -> LayerSizes:
        heads = layer.self_attention.query_key_value.out_features // (3 * self.head_dim(config))
        return LayerSizes(heads, heads, channels=layer.mlp.dense_4h_to_h.in_features)

    def head_dim(self, config: Any) -> int:
        return config.hidden_size // config.n_head

    def context(self, config: Any) -> int:
        # ALiBi has no maximal length; all released BLOOM models were trained with 2048 tokens.
        return getattr(config, "seq_length", 2048)

    def add_fields(self, writer: GGUFWriter, config: Any) -> None:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)

    def convert(self, name: str, rows: torch.Tensor, sizes: LayerSizes) -> torch.Tensor:
        return separated(rows, sizes.heads) if ".query_key_value." in name else rows


# By the `model_type` of the stock config.
FAMILIES = {
    "llama": Llama("llama", "deci", interleaves=True),
    "mistral": Llama("llama", "deci", interleaves=True),
    "qwen2": Llama("qwen2", all_heads=True, output_biases=False),
    "qwen3": Llama("qwen3", output_biases=False),
    "bloom": Bloom("bloom", all_heads=True),
}
