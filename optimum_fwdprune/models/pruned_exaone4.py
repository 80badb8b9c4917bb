"""EXAONE 4 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.exaone4 import modeling_exaone4 as stock
from transformers.models.exaone4.configuration_exaone4 import Exaone4Config

from .layout import NORMS_AFTER_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedExaone4Config(PerLayerConfigMixin, Exaone4Config):
    model_type = "pruned_exaone4"


class PrunedExaone4Mixin(PerLayerMixin):
    config_class = PrunedExaone4Config
    layout = NORMS_AFTER_LAYOUT


class PrunedExaone4Model(PrunedExaone4Mixin, stock.Exaone4Model): ...


class PrunedExaone4ForCausalLM(PrunedExaone4Mixin, stock.Exaone4ForCausalLM): ...


class PrunedExaone4ForSequenceClassification(PrunedExaone4Mixin, stock.Exaone4ForSequenceClassification): ...


class PrunedExaone4ForTokenClassification(PrunedExaone4Mixin, stock.Exaone4ForTokenClassification): ...


class PrunedExaone4ForQuestionAnswering(PrunedExaone4Mixin, stock.Exaone4ForQuestionAnswering): ...
