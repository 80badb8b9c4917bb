"""Granite with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.granite import modeling_granite as stock
from transformers.models.granite.configuration_granite import GraniteConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGraniteConfig(PerLayerConfigMixin, GraniteConfig):
    model_type = "pruned_granite"


class PrunedGraniteMixin(PerLayerMixin):
    config_class = PrunedGraniteConfig
    layout = replace(LLAMA_LAYOUT, residual_multiplier=lambda config: config.residual_multiplier)


class PrunedGraniteModel(PrunedGraniteMixin, stock.GraniteModel): ...


class PrunedGraniteForCausalLM(PrunedGraniteMixin, stock.GraniteForCausalLM): ...
