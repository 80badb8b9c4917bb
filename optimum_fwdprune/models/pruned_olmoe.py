"""OLMoE with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.olmoe import modeling_olmoe as stock
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig

from .experts import ExpertsLayout
from .layout import NORM_OVER_HEADS
from .mixtures import MIXTURE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedOlmoeConfig(PerLayerConfigMixin, OlmoeConfig):
    model_type = "pruned_olmoe"


class PrunedOlmoeMixin(PerLayerMixin):
    config_class = PrunedOlmoeConfig
    layout = replace(
        MIXTURE_LAYOUT,
        attention=replace(MIXTURE_LAYOUT.attention, fixed=NORM_OVER_HEADS),
        experts=ExpertsLayout(),
    )


class PrunedOlmoeModel(PrunedOlmoeMixin, stock.OlmoeModel): ...


class PrunedOlmoeForCausalLM(PrunedOlmoeMixin, stock.OlmoeForCausalLM): ...
