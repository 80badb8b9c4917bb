"""Mistral with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedMistralConfig(PerLayerConfigMixin, MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralMixin(PerLayerMixin):
    config_class = PrunedMistralConfig
    layout = LLAMA_LAYOUT


class PrunedMistralModel(PrunedMistralMixin, MistralModel):
    pass


class PrunedMistralForCausalLM(PrunedMistralMixin, MistralForCausalLM):
    pass


class PrunedMistralForSequenceClassification(PrunedMistralMixin, MistralForSequenceClassification):
    pass


class PrunedMistralForTokenClassification(PrunedMistralMixin, MistralForTokenClassification):
    pass


class PrunedMistralForQuestionAnswering(PrunedMistralMixin, MistralForQuestionAnswering):
    pass
