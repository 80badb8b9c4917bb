"""LLaMA with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedLlamaConfig(PerLayerConfigMixin, LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaMixin(PerLayerMixin):
    config_class = PrunedLlamaConfig
    layout = LLAMA_LAYOUT


class PrunedLlamaModel(PrunedLlamaMixin, LlamaModel):
    pass


class PrunedLlamaForCausalLM(PrunedLlamaMixin, LlamaForCausalLM):
    pass


class PrunedLlamaForSequenceClassification(PrunedLlamaMixin, LlamaForSequenceClassification):
    pass


class PrunedLlamaForTokenClassification(PrunedLlamaMixin, LlamaForTokenClassification):
    pass


class PrunedLlamaForQuestionAnswering(PrunedLlamaMixin, LlamaForQuestionAnswering):
    pass
