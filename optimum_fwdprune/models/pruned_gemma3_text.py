"""The text models of Gemma 3 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3 import modeling_gemma3 as stock
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig

from .layout import NORMS_AROUND_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGemma3TextConfig(PerLayerConfigMixin, Gemma3TextConfig):
    model_type = "pruned_gemma3_text"


class PrunedGemma3TextMixin(PerLayerMixin):
    config_class = PrunedGemma3TextConfig
    layout = NORMS_AROUND_LAYOUT


class PrunedGemma3TextModel(PrunedGemma3TextMixin, stock.Gemma3TextModel): ...


class PrunedGemma3ForCausalLM(PrunedGemma3TextMixin, stock.Gemma3ForCausalLM): ...


class PrunedGemma3TextForSequenceClassification(PrunedGemma3TextMixin, stock.Gemma3TextForSequenceClassification): ...
