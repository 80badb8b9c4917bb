"""GLM-4 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.glm4 import modeling_glm4 as stock
from transformers.models.glm4.configuration_glm4 import Glm4Config

from .layout import LLAMA_LAYOUT, MLPLayout, grouped_attention
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGlm4Config(PerLayerConfigMixin, Glm4Config):
    model_type = "pruned_glm4"


class PrunedGlm4Mixin(PerLayerMixin):
    config_class = PrunedGlm4Config
    layout = replace(
        LLAMA_LAYOUT,
        attention=replace(LLAMA_LAYOUT.attention, norms=("input_layernorm", "post_self_attn_layernorm")),
        mlp=MLPLayout(
            sources=("mlp.gate_up_proj",),
            output="mlp.down_proj",
            segments=2,
            norms=("post_attention_layernorm", "post_mlp_layernorm"),
        ),
        attributes=grouped_attention,
        output_norm=True,
    )


class PrunedGlm4Model(PrunedGlm4Mixin, stock.Glm4Model): ...


class PrunedGlm4ForCausalLM(PrunedGlm4Mixin, stock.Glm4ForCausalLM): ...


class PrunedGlm4ForSequenceClassification(PrunedGlm4Mixin, stock.Glm4ForSequenceClassification): ...


class PrunedGlm4ForTokenClassification(PrunedGlm4Mixin, stock.Glm4ForTokenClassification): ...
