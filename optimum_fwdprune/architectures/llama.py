from ..models import pruned_llama
from .layout import AttentionLayout, MLPLayout
from .registry import Architecture, register_architecture


LLAMA_ATTENTION = AttentionLayout(module="self_attn", query="q_proj", key="k_proj", value="v_proj", output="o_proj")
LLAMA_MLP = MLPLayout(sources=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj")

register_architecture(Architecture.from_module("llama", LLAMA_ATTENTION, LLAMA_MLP, pruned_llama))
