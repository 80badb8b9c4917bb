"""Qwen2 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2 import modeling_qwen2 as stock
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen2Config(PerLayerConfigMixin, Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2Mixin(PerLayerMixin):
    config_class = PrunedQwen2Config
    layout = LLAMA_LAYOUT


class PrunedQwen2Model(PrunedQwen2Mixin, stock.Qwen2Model): ...


class PrunedQwen2ForCausalLM(PrunedQwen2Mixin, stock.Qwen2ForCausalLM): ...


class PrunedQwen2ForSequenceClassification(PrunedQwen2Mixin, stock.Qwen2ForSequenceClassification): ...


class PrunedQwen2ForTokenClassification(PrunedQwen2Mixin, stock.Qwen2ForTokenClassification): ...


class PrunedQwen2ForQuestionAnswering(PrunedQwen2Mixin, stock.Qwen2ForQuestionAnswering): ...
