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

from .per_layer import PerLayerConfigMixin, PerLayerMixin, resize_llama_layer


@strict
class PrunedLlamaConfig(PerLayerConfigMixin, LlamaConfig):
    model_type = "pruned_llama"

    attention_output_bias: bool = False
    mlp_output_bias: bool = False


class PrunedLlamaMixin(PerLayerMixin):
    config_class = PrunedLlamaConfig
    resize = staticmethod(resize_llama_layer)


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
