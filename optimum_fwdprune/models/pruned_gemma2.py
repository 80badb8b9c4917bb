"""Gemma 2 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma2 import modeling_gemma2 as stock
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config

from .layout import NORMS_AROUND_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGemma2Config(PerLayerConfigMixin, Gemma2Config):
    model_type = "pruned_gemma2"


class PrunedGemma2Mixin(PerLayerMixin):
    config_class = PrunedGemma2Config
    layout = NORMS_AROUND_LAYOUT


class PrunedGemma2Model(PrunedGemma2Mixin, stock.Gemma2Model): ...


class PrunedGemma2ForCausalLM(PrunedGemma2Mixin, stock.Gemma2ForCausalLM): ...


class PrunedGemma2ForSequenceClassification(PrunedGemma2Mixin, stock.Gemma2ForSequenceClassification): ...


class PrunedGemma2ForTokenClassification(PrunedGemma2Mixin, stock.Gemma2ForTokenClassification): ...
