"""StableLM with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.stablelm import modeling_stablelm as stock
from transformers.models.stablelm.configuration_stablelm import StableLmConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedStableLmConfig(PerLayerConfigMixin, StableLmConfig):
    model_type = "pruned_stablelm"


class PrunedStableLmMixin(PerLayerMixin):
    config_class = PrunedStableLmConfig
    layout = replace(
        LLAMA_LAYOUT,
        attention=replace(LLAMA_LAYOUT.attention, query_norms="q_layernorm.norms", key_norms="k_layernorm.norms"),
        shares_norms=lambda config: config.use_parallel_residual,
        attributes=lambda config: {
            **LLAMA_LAYOUT.attributes(config),
            "self_attn.num_heads": config.num_attention_heads,
            "self_attn.num_key_value_heads": config.num_key_value_heads,
        },
    )


class PrunedStableLmModel(PrunedStableLmMixin, stock.StableLmModel): ...


class PrunedStableLmForCausalLM(PrunedStableLmMixin, stock.StableLmForCausalLM): ...


class PrunedStableLmForSequenceClassification(PrunedStableLmMixin, stock.StableLmForSequenceClassification): ...


class PrunedStableLmForTokenClassification(PrunedStableLmMixin, stock.StableLmForTokenClassification): ...
