"""What a third party writes to support its own family; here Phi-3, whose QKV and gate-up projections are fused."""

import sys

from huggingface_hub.dataclasses import strict
from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from optimum_fwdprune import Architecture, AttentionLayout, DecoderLayout, MLPLayout, register_architecture
from optimum_fwdprune.models.per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedPhi3Config(PerLayerConfigMixin, Phi3Config):
    model_type = "pruned_phi3"


class PrunedPhi3Mixin(PerLayerMixin):
    config_class = PrunedPhi3Config
    layout = DecoderLayout(
        AttentionLayout(module="self_attn", fused="qkv_proj", output="o_proj"),
        MLPLayout(sources=("mlp.gate_up_proj",), output="mlp.down_proj", segments=2),
        attributes=lambda config: {
            "self_attn.num_key_value_heads": config.num_key_value_heads,
            "self_attn.num_key_value_groups": config.num_attention_heads // config.num_key_value_heads,
            # Phi-3's attention also reads its sizes from its config, so that one must be the layer's.
            "self_attn.config": config,
        },
    )


class PrunedPhi3Model(PrunedPhi3Mixin, Phi3Model):
    pass


class PrunedPhi3ForCausalLM(PrunedPhi3Mixin, Phi3ForCausalLM):
    pass


def register_phi3():
    register_architecture(Architecture.from_module(sys.modules[__name__]))
