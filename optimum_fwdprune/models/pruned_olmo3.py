"""OLMo 3 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.olmo3 import modeling_olmo3 as stock
from transformers.models.olmo3.configuration_olmo3 import Olmo3Config

from .layout import NORM_OVER_HEADS, NORMS_AFTER_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedOlmo3Config(PerLayerConfigMixin, Olmo3Config):
    model_type = "pruned_olmo3"


class PrunedOlmo3Mixin(PerLayerMixin):
    config_class = PrunedOlmo3Config
    layout = replace(NORMS_AFTER_LAYOUT, attention=replace(NORMS_AFTER_LAYOUT.attention, fixed=NORM_OVER_HEADS))


class PrunedOlmo3Model(PrunedOlmo3Mixin, stock.Olmo3Model): ...


class PrunedOlmo3ForCausalLM(PrunedOlmo3Mixin, stock.Olmo3ForCausalLM): ...


class PrunedOlmo3ForSequenceClassification(PrunedOlmo3Mixin, stock.Olmo3ForSequenceClassification): ...
