"""Helium with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.helium import modeling_helium as stock
from transformers.models.helium.configuration_helium import HeliumConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedHeliumConfig(PerLayerConfigMixin, HeliumConfig):
    model_type = "pruned_helium"


class PrunedHeliumMixin(PerLayerMixin):
    config_class = PrunedHeliumConfig
    layout = LLAMA_LAYOUT


class PrunedHeliumModel(PrunedHeliumMixin, stock.HeliumModel): ...


class PrunedHeliumForCausalLM(PrunedHeliumMixin, stock.HeliumForCausalLM): ...


class PrunedHeliumForSequenceClassification(PrunedHeliumMixin, stock.HeliumForSequenceClassification): ...


class PrunedHeliumForTokenClassification(PrunedHeliumMixin, stock.HeliumForTokenClassification): ...
