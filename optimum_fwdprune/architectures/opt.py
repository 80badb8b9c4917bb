from ..models import pruned_opt
from .layout import AttentionLayout, MLPLayout
from .registry import Architecture, register_architecture


register_architecture(
    Architecture.from_module(
        "opt",
        AttentionLayout(
            module="self_attn", query="q_proj", key="k_proj", value="v_proj", output="out_proj", kv_heads_key=None
        ),
        MLPLayout(sources=("fc1",), output="fc2", width_key="ffn_dim"),
        pruned_opt,
        residual_adds_up=lambda config: config.do_layer_norm_before,
    )
)
