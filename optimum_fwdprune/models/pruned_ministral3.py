"""Ministral 3 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.ministral3 import modeling_ministral3 as stock
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedMinistral3Config(PerLayerConfigMixin, Ministral3Config):
    model_type = "pruned_ministral3"


class PrunedMinistral3Mixin(PerLayerMixin):
    config_class = PrunedMinistral3Config
    layout = LLAMA_LAYOUT


class PrunedMinistral3Model(PrunedMinistral3Mixin, stock.Ministral3Model): ...


class PrunedMinistral3ForCausalLM(PrunedMinistral3Mixin, stock.Ministral3ForCausalLM): ...


class PrunedMinistral3ForSequenceClassification(PrunedMinistral3Mixin, stock.Ministral3ForSequenceClassification): ...


class PrunedMinistral3ForTokenClassification(PrunedMinistral3Mixin, stock.Ministral3ForTokenClassification): ...


class PrunedMinistral3ForQuestionAnswering(PrunedMinistral3Mixin, stock.Ministral3ForQuestionAnswering): ...
