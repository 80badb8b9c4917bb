"""What a third party writes to support its own family; here Persimmon, whose query, key and value rows are fused."""

import sys

from huggingface_hub.dataclasses import strict
from transformers import PersimmonConfig, PersimmonForCausalLM, PersimmonModel

from optimum_fwdprune import Architecture, AttentionLayout, DecoderLayout, MLPLayout, register_architecture
from optimum_fwdprune.models.per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedPersimmonConfig(PerLayerConfigMixin, PersimmonConfig):
    model_type = "pruned_persimmon"


class PrunedPersimmonMixin(PerLayerMixin):
    config_class = PrunedPersimmonConfig
    layout = DecoderLayout(
        AttentionLayout(
            module="self_attn", fused="query_key_value", interleaved=True, output="dense", kv_heads_key=None
        ),
        MLPLayout(sources=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h"),
        # The attention reads its number of heads from an attribute.
        attributes=lambda config: {"self_attn.num_heads": config.num_attention_heads},
    )


class PrunedPersimmonModel(PrunedPersimmonMixin, PersimmonModel):
    pass


class PrunedPersimmonForCausalLM(PrunedPersimmonMixin, PersimmonForCausalLM):
    pass


def register_persimmon():
    register_architecture(Architecture.from_module(sys.modules[__name__]))
