"""GLM with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.glm import modeling_glm as stock
from transformers.models.glm.configuration_glm import GlmConfig

from .layout import LLAMA_LAYOUT, MLPLayout, grouped_attention
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGlmConfig(PerLayerConfigMixin, GlmConfig):
    model_type = "pruned_glm"


class PrunedGlmMixin(PerLayerMixin):
    config_class = PrunedGlmConfig
    layout = replace(
        LLAMA_LAYOUT,
        mlp=MLPLayout(
            sources=("mlp.gate_up_proj",), output="mlp.down_proj", segments=2, norms=("post_attention_layernorm",)
        ),
        attributes=grouped_attention,
    )


class PrunedGlmModel(PrunedGlmMixin, stock.GlmModel): ...


class PrunedGlmForCausalLM(PrunedGlmMixin, stock.GlmForCausalLM): ...


class PrunedGlmForSequenceClassification(PrunedGlmMixin, stock.GlmForSequenceClassification): ...


class PrunedGlmForTokenClassification(PrunedGlmMixin, stock.GlmForTokenClassification): ...
