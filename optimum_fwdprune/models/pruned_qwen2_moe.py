"""Qwen2-MoE with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_moe import modeling_qwen2_moe as stock
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig

from .mixtures import SPARSE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen2MoeConfig(PerLayerConfigMixin, Qwen2MoeConfig):
    model_type = "pruned_qwen2_moe"


class PrunedQwen2MoeMixin(PerLayerMixin):
    config_class = PrunedQwen2MoeConfig
    layout = SPARSE_LAYOUT


class PrunedQwen2MoeModel(PrunedQwen2MoeMixin, stock.Qwen2MoeModel): ...


class PrunedQwen2MoeForCausalLM(PrunedQwen2MoeMixin, stock.Qwen2MoeForCausalLM): ...


class PrunedQwen2MoeForSequenceClassification(PrunedQwen2MoeMixin, stock.Qwen2MoeForSequenceClassification): ...


class PrunedQwen2MoeForTokenClassification(PrunedQwen2MoeMixin, stock.Qwen2MoeForTokenClassification): ...


class PrunedQwen2MoeForQuestionAnswering(PrunedQwen2MoeMixin, stock.Qwen2MoeForQuestionAnswering): ...
