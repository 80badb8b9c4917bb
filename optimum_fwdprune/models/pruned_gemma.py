"""Gemma with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma import modeling_gemma as stock
from transformers.models.gemma.configuration_gemma import GemmaConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGemmaConfig(PerLayerConfigMixin, GemmaConfig):
    model_type = "pruned_gemma"


class PrunedGemmaMixin(PerLayerMixin):
    config_class = PrunedGemmaConfig
    layout = LLAMA_LAYOUT


class PrunedGemmaModel(PrunedGemmaMixin, stock.GemmaModel): ...


class PrunedGemmaForCausalLM(PrunedGemmaMixin, stock.GemmaForCausalLM): ...


class PrunedGemmaForSequenceClassification(PrunedGemmaMixin, stock.GemmaForSequenceClassification): ...


class PrunedGemmaForTokenClassification(PrunedGemmaMixin, stock.GemmaForTokenClassification): ...
