from ..models import pruned_bloom
from .layout import AttentionLayout, MLPLayout
from .registry import Architecture, register_architecture


register_architecture(
    Architecture.from_module(
        "bloom",
        AttentionLayout(
            module="self_attention",
            fused="query_key_value",
            interleaved=True,
            output="dense",
            heads_key="n_head",
            kv_heads_key=None,
            kept_heads_key="kept_heads",
        ),
        MLPLayout(sources=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h"),
        pruned_bloom,
        residual_adds_up=lambda config: not config.apply_residual_connection_post_layernorm,
    )
)
