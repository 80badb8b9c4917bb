"""OLMo 2 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.olmo2 import modeling_olmo2 as stock
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

from .layout import LLAMA_LAYOUT, NORM_OVER_HEADS
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedOlmo2Config(PerLayerConfigMixin, Olmo2Config):
    model_type = "pruned_olmo2"


class PrunedOlmo2Mixin(PerLayerMixin):
    config_class = PrunedOlmo2Config
    layout = replace(
        LLAMA_LAYOUT,
        attention=replace(LLAMA_LAYOUT.attention, norms=("post_attention_layernorm",), fixed=NORM_OVER_HEADS),
        mlp=replace(LLAMA_LAYOUT.mlp, norms=("post_feedforward_layernorm",)),
        output_norm=True,
    )


class PrunedOlmo2Model(PrunedOlmo2Mixin, stock.Olmo2Model): ...


class PrunedOlmo2ForCausalLM(PrunedOlmo2Mixin, stock.Olmo2ForCausalLM): ...


class PrunedOlmo2ForSequenceClassification(PrunedOlmo2Mixin, stock.Olmo2ForSequenceClassification): ...
