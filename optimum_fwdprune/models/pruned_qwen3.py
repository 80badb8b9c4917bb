"""Qwen3 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3 import modeling_qwen3 as stock
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen3Config(PerLayerConfigMixin, Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Mixin(PerLayerMixin):
    config_class = PrunedQwen3Config
    layout = LLAMA_LAYOUT


class PrunedQwen3Model(PrunedQwen3Mixin, stock.Qwen3Model): ...


class PrunedQwen3ForCausalLM(PrunedQwen3Mixin, stock.Qwen3ForCausalLM): ...


class PrunedQwen3ForSequenceClassification(PrunedQwen3Mixin, stock.Qwen3ForSequenceClassification): ...


class PrunedQwen3ForTokenClassification(PrunedQwen3Mixin, stock.Qwen3ForTokenClassification): ...


class PrunedQwen3ForQuestionAnswering(PrunedQwen3Mixin, stock.Qwen3ForQuestionAnswering): ...
