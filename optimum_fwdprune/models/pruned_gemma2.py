"""Gemma 2 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.gemma2 import modeling_gemma2 as stock
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGemma2Config(PerLayerConfigMixin, Gemma2Config):
    model_type = "pruned_gemma2"


class PrunedGemma2Mixin(PerLayerMixin):
    config_class = PrunedGemma2Config
    layout = replace(
        LLAMA_LAYOUT,
        attention=replace(LLAMA_LAYOUT.attention, norms=("input_layernorm", "post_attention_layernorm")),
        mlp=replace(LLAMA_LAYOUT.mlp, norms=("pre_feedforward_layernorm", "post_feedforward_layernorm")),
        output_norm=True,
    )


class PrunedGemma2Model(PrunedGemma2Mixin, stock.Gemma2Model): ...


class PrunedGemma2ForCausalLM(PrunedGemma2Mixin, stock.Gemma2ForCausalLM): ...


class PrunedGemma2ForSequenceClassification(PrunedGemma2Mixin, stock.Gemma2ForSequenceClassification): ...


class PrunedGemma2ForTokenClassification(PrunedGemma2Mixin, stock.Gemma2ForTokenClassification): ...
