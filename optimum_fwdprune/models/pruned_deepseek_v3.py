"""DeepSeek-V3 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as stock
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from .experts import GROUPED_EXPERTS
from .layout import LLAMA_LAYOUT, AttentionLayout, DecoderLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedDeepseekV3Config(PerLayerConfigMixin, DeepseekV3Config):
    model_type = "pruned_deepseek_v3"


class PrunedDeepseekV3Mixin(PerLayerMixin):
    config_class = PrunedDeepseekV3Config
    layout = DecoderLayout(
        AttentionLayout(
            module="self_attn",
            output="o_proj",
            head_dim="v_head_dim",
            kv_heads_key=None,
            norms=("input_layernorm",),
            fixed="its heads share compressed queries, keys and values (multi-head latent attention).",
        ),
        LLAMA_LAYOUT.mlp,
        GROUPED_EXPERTS,
        whole=(
            "self_attn.q_proj",
            "self_attn.q_a_proj",
            "self_attn.q_b_proj",
            "self_attn.kv_a_proj_with_mqa",
            "self_attn.kv_b_proj",
        ),
    )


class PrunedDeepseekV3Model(PrunedDeepseekV3Mixin, stock.DeepseekV3Model): ...


class PrunedDeepseekV3ForCausalLM(PrunedDeepseekV3Mixin, stock.DeepseekV3ForCausalLM): ...


class PrunedDeepseekV3ForSequenceClassification(PrunedDeepseekV3Mixin, stock.DeepseekV3ForSequenceClassification): ...


class PrunedDeepseekV3ForTokenClassification(PrunedDeepseekV3Mixin, stock.DeepseekV3ForTokenClassification): ...
