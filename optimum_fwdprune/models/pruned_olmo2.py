"""OLMo 2 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.olmo2 import modeling_olmo2 as stock
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config

from .layout import NORM_OVER_HEADS, NORMS_AFTER_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedOlmo2Config(PerLayerConfigMixin, Olmo2Config):
    model_type = "pruned_olmo2"


class PrunedOlmo2Mixin(PerLayerMixin):
    config_class = PrunedOlmo2Config
    layout = replace(NORMS_AFTER_LAYOUT, attention=replace(NORMS_AFTER_LAYOUT.attention, fixed=NORM_OVER_HEADS))


class PrunedOlmo2Model(PrunedOlmo2Mixin, stock.Olmo2Model): ...


class PrunedOlmo2ForCausalLM(PrunedOlmo2Mixin, stock.Olmo2ForCausalLM): ...


class PrunedOlmo2ForSequenceClassification(PrunedOlmo2Mixin, stock.Olmo2ForSequenceClassification): ...
