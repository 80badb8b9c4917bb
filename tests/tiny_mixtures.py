"""Tiny mixtures of experts of every family, built from configs."""

import tiny
import torch
import transformers


_SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
}
_OWN_WIDTH = {"moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12}

# Every family, with shared experts, dense layers, groups and scales where it has them.
CONFIGS = {
    "mixtral": (transformers.MixtralConfig, {**_SIZES, "num_local_experts": 8}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {**_SIZES, **_OWN_WIDTH, "num_experts": 8, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {**_SIZES, **_OWN_WIDTH, "num_experts": 8, "head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "olmoe": (transformers.OlmoeConfig, {**_SIZES, "num_experts": 8}),
    "gpt_oss": (
        transformers.GptOssConfig,
        {**_SIZES, "num_local_experts": 8, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0},
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        {**_SIZES, **_OWN_WIDTH, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
            **_SIZES,
            **_OWN_WIDTH,
            **_LATENT,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
        },
    ),
    "phimoe": (transformers.PhimoeConfig, {**_SIZES, "num_local_experts": 8, "pad_token_id": 0}),
    "granitemoe": (
        transformers.GraniteMoeConfig,
        {**_SIZES, "num_local_experts": 8, "residual_multiplier": 0.5, "pad_token_id": 0},
    ),
}


def make_mixture(name, seed=0, dtype=torch.float32, auto_class=transformers.AutoModelForCausalLM, **changes):
    """Build a dense tiny mixture with random weights, biases, norms and corrections of routers, in eval mode."""
    torch.manual_seed(seed)
    config_class, values = CONFIGS[name]
    model = auto_class.from_config(config_class(**{**values, **changes}), dtype=dtype)
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor_name.endswith("inv_freq"):
                continue
            # Initial biases and corrections are zero and norms one, which would hide one that is cut wrongly.
            if tensor.dim() == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
            else:
                tensor.mul_(5)
    return model.eval()
