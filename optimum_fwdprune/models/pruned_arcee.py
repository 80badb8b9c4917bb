"""Arcee with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.arcee import modeling_arcee as stock
from transformers.models.arcee.configuration_arcee import ArceeConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedArceeConfig(PerLayerConfigMixin, ArceeConfig):
    model_type = "pruned_arcee"


class PrunedArceeMixin(PerLayerMixin):
    config_class = PrunedArceeConfig
    layout = replace(
        LLAMA_LAYOUT,
        mlp=replace(LLAMA_LAYOUT.mlp, sources=("mlp.up_proj",)),
    )


class PrunedArceeModel(PrunedArceeMixin, stock.ArceeModel): ...


class PrunedArceeForCausalLM(PrunedArceeMixin, stock.ArceeForCausalLM): ...


class PrunedArceeForSequenceClassification(PrunedArceeMixin, stock.ArceeForSequenceClassification): ...


class PrunedArceeForTokenClassification(PrunedArceeMixin, stock.ArceeForTokenClassification): ...


class PrunedArceeForQuestionAnswering(PrunedArceeMixin, stock.ArceeForQuestionAnswering): ...
