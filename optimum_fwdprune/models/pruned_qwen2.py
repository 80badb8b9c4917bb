"""Qwen2 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen2Config(PerLayerConfigMixin, Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2Mixin(PerLayerMixin):
    config_class = PrunedQwen2Config
    layout = LLAMA_LAYOUT


class PrunedQwen2Model(PrunedQwen2Mixin, Qwen2Model):
    pass


class PrunedQwen2ForCausalLM(PrunedQwen2Mixin, Qwen2ForCausalLM):
    pass


class PrunedQwen2ForSequenceClassification(PrunedQwen2Mixin, Qwen2ForSequenceClassification):
    pass


class PrunedQwen2ForTokenClassification(PrunedQwen2Mixin, Qwen2ForTokenClassification):
    pass


class PrunedQwen2ForQuestionAnswering(PrunedQwen2Mixin, Qwen2ForQuestionAnswering):
    pass
