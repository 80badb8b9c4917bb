"""Qwen3 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen3Config(PerLayerConfigMixin, Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Mixin(PerLayerMixin):
    config_class = PrunedQwen3Config
    layout = LLAMA_LAYOUT


class PrunedQwen3Model(PrunedQwen3Mixin, Qwen3Model):
    pass


class PrunedQwen3ForCausalLM(PrunedQwen3Mixin, Qwen3ForCausalLM):
    pass


class PrunedQwen3ForSequenceClassification(PrunedQwen3Mixin, Qwen3ForSequenceClassification):
    pass


class PrunedQwen3ForTokenClassification(PrunedQwen3Mixin, Qwen3ForTokenClassification):
    pass


class PrunedQwen3ForQuestionAnswering(PrunedQwen3Mixin, Qwen3ForQuestionAnswering):
    pass
