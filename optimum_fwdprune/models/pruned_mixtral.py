"""Mixtral with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.mixtral import modeling_mixtral as stock
from transformers.models.mixtral.configuration_mixtral import MixtralConfig

from .mixtures import MIXTURE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedMixtralConfig(PerLayerConfigMixin, MixtralConfig):
    model_type = "pruned_mixtral"


class PrunedMixtralMixin(PerLayerMixin):
    config_class = PrunedMixtralConfig
    layout = MIXTURE_LAYOUT


class PrunedMixtralModel(PrunedMixtralMixin, stock.MixtralModel): ...


class PrunedMixtralForCausalLM(PrunedMixtralMixin, stock.MixtralForCausalLM): ...


class PrunedMixtralForSequenceClassification(PrunedMixtralMixin, stock.MixtralForSequenceClassification): ...


class PrunedMixtralForTokenClassification(PrunedMixtralMixin, stock.MixtralForTokenClassification): ...


class PrunedMixtralForQuestionAnswering(PrunedMixtralMixin, stock.MixtralForQuestionAnswering): ...
