"""Hyperparameters of GGUF files other than sizes, each added by a function of the writer and the stock config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..architectures.gguf import head_dim_of, rope_of, rope_type
from ..runs.loggers import get_logger


if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = get_logger(__name__)

# Of every so many layers, the last one attends to everything, where the file does not list the layers.
SLIDING_PERIODS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4, "gpt_oss": 2}

# The epsilon of OLMo's norms is no entry of its config.
EPSILON_OF_OLMO = 1e-5


def context_length(config: Any) -> int:
    """Return the number of tokens that the model was trained with at a time."""
    # ALiBi has no maximal length; all released BLOOM models were trained with 2048 tokens.
    return int(getattr(config, "max_position_embeddings", getattr(config, "seq_length", 2048)))


def rope_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Return the factors `[head_dim / 2]` that rotary frequencies are divided by, by the names of their tensors."""
    kind = rope_type(config)
    if kind == "llama3":
        parameters, dimensions = rope_of(config), head_dim_of(config)
        plain = parameters["rope_theta"] ** (-torch.arange(0, dimensions, 2).float() / dimensions)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return {"rope_freqs.weight": plain / scaled}
    if kind == "longrope":
        factors = {f"rope_factors_{which}.weight": rope_of(config)[f"{which}_factor"] for which in ("long", "short")}
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()}
    return {}


def rms_norm(writer: GGUFWriter, config: Any) -> None:
    """Add the epsilon of norms by the root mean square."""
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def layer_norm(writer: GGUFWriter, config: Any) -> None:
    """Add the epsilon of norms by mean and variance."""
    names = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    writer.add_layer_norm_eps(next(getattr(config, name) for name in names if hasattr(config, name)))


def head_dim(writer: GGUFWriter, config: Any) -> None:
    """Add the size of a head, which llama.cpp takes from the hidden size otherwise."""
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))


def rope(writer: GGUFWriter, config: Any) -> None:
    """Add the base of the rotary embeddings, the number of features that they rotate, and their scaling."""
    import gguf

    parameters = rope_of(config)
    writer.add_rope_dimension_count(int(head_dim_of(config) * parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(parameters["rope_theta"])
    kind = rope_type(config)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    elif kind == "yarn":
        _yarn(writer, config)
    elif kind == "longrope":
        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(attention_factor)


def _yarn(writer: GGUFWriter, config: Any) -> None:
    """Add the scaling of YaRN. Its attention factor is the default one, which llama.cpp computes itself."""
    import gguf

    parameters = rope_of(config)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(parameters.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(parameters.get("beta_slow") or 1.0)
    if not parameters.get("truncate", True):
        logger.warning(
            "This model has YaRN with truncate=False, and llama.cpp rounds the features between which it changes from "
            "extrapolation to interpolation. Outputs differ slightly, as in all files of this family."
        )


def sliding_windows(writer: GGUFWriter, config: Any) -> None:
    """Add the length of sliding windows, the layers that have them, and the base of their rotary embeddings."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])
    period = SLIDING_PERIODS[config.model_type]
    # Only newer llama.cpp reads a list.
    if slides != [number % period < period - 1 for number in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


def soft_caps(writer: GGUFWriter, config: Any) -> None:
    """Add the bounds of attention scores and logits. llama.cpp always applies them, here too high to have an effect
    where the model has none."""
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 1e9)
    writer.add_final_logit_softcapping(config.final_logit_softcapping or 1e9)


def fixed_layer_norm(writer: GGUFWriter, config: Any) -> None:
    """Add the epsilon of OLMo's norms by mean and variance."""
    writer.add_layer_norm_eps(EPSILON_OF_OLMO)


def clamp(writer: GGUFWriter, config: Any) -> None:
    """Add the bound of queries, keys and values; 0 is none."""
    writer.add_clamp_kqv(config.clip_qkv or 0.0)


def logit_scale(writer: GGUFWriter, config: Any) -> None:
    """Add the number by which logits are multiplied."""
    writer.add_logit_scale(config.logit_scale)


def granite_scales(writer: GGUFWriter, config: Any) -> None:
    """Add the numbers by which embeddings, attention scores, projections and logits are scaled."""
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def shared_expert(writer: GGUFWriter, config: Any) -> None:
    """Add the number of channels of the expert that every token uses."""
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def parallel_blocks(writer: GGUFWriter, config: Any) -> None:
    """Add whether attention and MLP read the same residual stream."""
    writer.add_parallel_residual(config.use_parallel_residual)
