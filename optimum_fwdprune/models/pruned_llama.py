"""LLaMA with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama import modeling_llama as stock
from transformers.models.llama.configuration_llama import LlamaConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedLlamaConfig(PerLayerConfigMixin, LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaMixin(PerLayerMixin):
    config_class = PrunedLlamaConfig
    layout = LLAMA_LAYOUT


class PrunedLlamaModel(PrunedLlamaMixin, stock.LlamaModel): ...


class PrunedLlamaForCausalLM(PrunedLlamaMixin, stock.LlamaForCausalLM): ...


class PrunedLlamaForSequenceClassification(PrunedLlamaMixin, stock.LlamaForSequenceClassification): ...


class PrunedLlamaForTokenClassification(PrunedLlamaMixin, stock.LlamaForTokenClassification): ...


class PrunedLlamaForQuestionAnswering(PrunedLlamaMixin, stock.LlamaForQuestionAnswering): ...
