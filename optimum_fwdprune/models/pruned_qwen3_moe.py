"""Qwen3-MoE with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe import modeling_qwen3_moe as stock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from .mixtures import SPARSE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen3MoeConfig(PerLayerConfigMixin, Qwen3MoeConfig):
    model_type = "pruned_qwen3_moe"


class PrunedQwen3MoeMixin(PerLayerMixin):
    config_class = PrunedQwen3MoeConfig
    layout = SPARSE_LAYOUT


class PrunedQwen3MoeModel(PrunedQwen3MoeMixin, stock.Qwen3MoeModel): ...


class PrunedQwen3MoeForCausalLM(PrunedQwen3MoeMixin, stock.Qwen3MoeForCausalLM): ...


class PrunedQwen3MoeForSequenceClassification(PrunedQwen3MoeMixin, stock.Qwen3MoeForSequenceClassification): ...


class PrunedQwen3MoeForTokenClassification(PrunedQwen3MoeMixin, stock.Qwen3MoeForTokenClassification): ...


class PrunedQwen3MoeForQuestionAnswering(PrunedQwen3MoeMixin, stock.Qwen3MoeForQuestionAnswering): ...
