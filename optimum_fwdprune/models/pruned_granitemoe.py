"""Granite-MoE with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.granitemoe import modeling_granitemoe as stock
from transformers.models.granitemoe.configuration_granitemoe import GraniteMoeConfig

from .experts import ExpertsLayout
from .mixtures import MIXTURE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGraniteMoeConfig(PerLayerConfigMixin, GraniteMoeConfig):
    model_type = "pruned_granitemoe"


class PrunedGraniteMoeMixin(PerLayerMixin):
    config_class = PrunedGraniteMoeConfig
    layout = replace(
        MIXTURE_LAYOUT,
        experts=ExpertsLayout(module="block_sparse_moe", router="router", count_key="num_local_experts"),
        residual_multiplier=lambda config: config.residual_multiplier,
    )


class PrunedGraniteMoeModel(PrunedGraniteMoeMixin, stock.GraniteMoeModel): ...


class PrunedGraniteMoeForCausalLM(PrunedGraniteMoeMixin, stock.GraniteMoeForCausalLM): ...
