"""ERNIE 4.5 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.ernie4_5 import modeling_ernie4_5 as stock
from transformers.models.ernie4_5.configuration_ernie4_5 import Ernie4_5Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedErnie4_5Config(PerLayerConfigMixin, Ernie4_5Config):
    model_type = "pruned_ernie4_5"


class PrunedErnie4_5Mixin(PerLayerMixin):
    config_class = PrunedErnie4_5Config
    layout = LLAMA_LAYOUT


class PrunedErnie4_5Model(PrunedErnie4_5Mixin, stock.Ernie4_5Model): ...


class PrunedErnie4_5ForCausalLM(PrunedErnie4_5Mixin, stock.Ernie4_5ForCausalLM): ...
