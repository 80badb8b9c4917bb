"""Mistral with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.mistral import modeling_mistral as stock
from transformers.models.mistral.configuration_mistral import MistralConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedMistralConfig(PerLayerConfigMixin, MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralMixin(PerLayerMixin):
    config_class = PrunedMistralConfig
    layout = LLAMA_LAYOUT


class PrunedMistralModel(PrunedMistralMixin, stock.MistralModel): ...


class PrunedMistralForCausalLM(PrunedMistralMixin, stock.MistralForCausalLM): ...


class PrunedMistralForSequenceClassification(PrunedMistralMixin, stock.MistralForSequenceClassification): ...


class PrunedMistralForTokenClassification(PrunedMistralMixin, stock.MistralForTokenClassification): ...


class PrunedMistralForQuestionAnswering(PrunedMistralMixin, stock.MistralForQuestionAnswering): ...
