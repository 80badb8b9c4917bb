"""What a third party writes to support its own family; here Phi-3, whose QKV and gate-up projections are fused."""

import sys

from huggingface_hub.dataclasses import strict
from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from optimum_fwdprune import Architecture, AttentionLayout, MLPLayout, register_architecture
from optimum_fwdprune.models.per_layer import PerLayerConfigMixin, PerLayerMixin, resize_linear


@strict
class PrunedPhi3Config(PerLayerConfigMixin, Phi3Config):
    model_type = "pruned_phi3"

    attention_output_bias: bool = False
    mlp_output_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class PrunedPhi3Mixin(PerLayerMixin):
    config_class = PrunedPhi3Config

    @staticmethod
    def resize(layer, config):
        attention, width = layer.self_attn, config.intermediate_size
        query, key = (n * attention.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        resize_linear(attention, "qkv_proj", out_features=query + 2 * key)
        resize_linear(attention, "o_proj", in_features=query, add_bias=config.attention_output_bias)
        attention.num_key_value_heads = config.num_key_value_heads
        attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        # Phi-3's attention also reads its sizes from its config, so that one must be the layer's.
        attention.config = config
        resize_linear(layer.mlp, "gate_up_proj", out_features=2 * width)
        resize_linear(layer.mlp, "down_proj", in_features=width, add_bias=config.mlp_output_bias)


class PrunedPhi3Model(PrunedPhi3Mixin, Phi3Model):
    pass


class PrunedPhi3ForCausalLM(PrunedPhi3Mixin, Phi3ForCausalLM):
    pass


def register_phi3():
    attention = AttentionLayout(module="self_attn", fused="qkv_proj", output="o_proj")
    mlp = MLPLayout(sources=("mlp.gate_up_proj",), output="mlp.down_proj", segments=2)
    register_architecture(Architecture.from_module("phi3", attention, mlp, sys.modules[__name__]))
