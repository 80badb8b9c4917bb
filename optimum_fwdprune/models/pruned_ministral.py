"""Ministral with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.ministral import modeling_ministral as stock
from transformers.models.ministral.configuration_ministral import MinistralConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedMinistralConfig(PerLayerConfigMixin, MinistralConfig):
    model_type = "pruned_ministral"


class PrunedMinistralMixin(PerLayerMixin):
    config_class = PrunedMinistralConfig
    layout = LLAMA_LAYOUT


class PrunedMinistralModel(PrunedMinistralMixin, stock.MinistralModel): ...


class PrunedMinistralForCausalLM(PrunedMinistralMixin, stock.MinistralForCausalLM): ...


class PrunedMinistralForSequenceClassification(PrunedMinistralMixin, stock.MinistralForSequenceClassification): ...


class PrunedMinistralForTokenClassification(PrunedMinistralMixin, stock.MinistralForTokenClassification): ...


class PrunedMinistralForQuestionAnswering(PrunedMinistralMixin, stock.MinistralForQuestionAnswering): ...
