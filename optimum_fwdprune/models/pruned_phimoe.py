"""Phi-3.5-MoE with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.phimoe import modeling_phimoe as stock
from transformers.models.phimoe.configuration_phimoe import PhimoeConfig

from .experts import ExpertsLayout
from .mixtures import MIXTURE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedPhimoeConfig(PerLayerConfigMixin, PhimoeConfig):
    model_type = "pruned_phimoe"


class PrunedPhimoeMixin(PerLayerMixin):
    config_class = PrunedPhimoeConfig
    layout = replace(MIXTURE_LAYOUT, experts=ExpertsLayout(router="router", count_key="num_local_experts"))


class PrunedPhimoeModel(PrunedPhimoeMixin, stock.PhimoeModel): ...


class PrunedPhimoeForCausalLM(PrunedPhimoeMixin, stock.PhimoeForCausalLM): ...


class PrunedPhimoeForSequenceClassification(PrunedPhimoeMixin, stock.PhimoeForSequenceClassification): ...
