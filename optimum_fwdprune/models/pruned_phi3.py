"""Phi-3 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.phi3 import modeling_phi3 as stock
from transformers.models.phi3.configuration_phi3 import Phi3Config

from .layout import AttentionLayout, DecoderLayout, MLPLayout, grouped_attention
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedPhi3Config(PerLayerConfigMixin, Phi3Config):
    model_type = "pruned_phi3"


class PrunedPhi3Mixin(PerLayerMixin):
    config_class = PrunedPhi3Config
    layout = DecoderLayout(
        AttentionLayout(module="self_attn", fused="qkv_proj", output="o_proj", norms=("input_layernorm",)),
        MLPLayout(
            sources=("mlp.gate_up_proj",), output="mlp.down_proj", segments=2, norms=("post_attention_layernorm",)
        ),
        attributes=lambda config: {
            **grouped_attention(config),
            "self_attn.num_key_value_heads": config.num_key_value_heads,
            # The attention reads its sizes from its config too.
            "self_attn.config": config,
        },
    )


class PrunedPhi3Model(PrunedPhi3Mixin, stock.Phi3Model): ...


class PrunedPhi3ForCausalLM(PrunedPhi3Mixin, stock.Phi3ForCausalLM): ...


class PrunedPhi3ForSequenceClassification(PrunedPhi3Mixin, stock.Phi3ForSequenceClassification): ...


class PrunedPhi3ForTokenClassification(PrunedPhi3Mixin, stock.Phi3ForTokenClassification): ...
