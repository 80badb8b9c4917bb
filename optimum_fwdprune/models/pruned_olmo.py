"""OLMo with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo import modeling_olmo as stock
from transformers.models.olmo.configuration_olmo import OlmoConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedOlmoConfig(PerLayerConfigMixin, OlmoConfig):
    model_type = "pruned_olmo"


class PrunedOlmoMixin(PerLayerMixin):
    config_class = PrunedOlmoConfig
    layout = LLAMA_LAYOUT


class PrunedOlmoModel(PrunedOlmoMixin, stock.OlmoModel): ...


class PrunedOlmoForCausalLM(PrunedOlmoMixin, stock.OlmoForCausalLM): ...


class PrunedOlmoForSequenceClassification(PrunedOlmoMixin, stock.OlmoForSequenceClassification): ...
