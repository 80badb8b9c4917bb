"""GLM-4-MoE with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.glm4_moe import modeling_glm4_moe as stock
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig

from .experts import GROUPED_EXPERTS
from .mixtures import SPARSE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGlm4MoeConfig(PerLayerConfigMixin, Glm4MoeConfig):
    model_type = "pruned_glm4_moe"


class PrunedGlm4MoeMixin(PerLayerMixin):
    config_class = PrunedGlm4MoeConfig
    layout = replace(SPARSE_LAYOUT, experts=GROUPED_EXPERTS)


class PrunedGlm4MoeModel(PrunedGlm4MoeMixin, stock.Glm4MoeModel): ...


class PrunedGlm4MoeForCausalLM(PrunedGlm4MoeMixin, stock.Glm4MoeForCausalLM): ...
