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

from .per_layer import PerLayerConfigMixin, PerLayerMixin, resize_llama_layer


@strict
class PrunedQwen2Config(PerLayerConfigMixin, Qwen2Config):
    model_type = "pruned_qwen2"

    attention_output_bias: bool = False
    mlp_output_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        # The stock config derives it from the number of heads, which no longer divides the hidden size.
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class PrunedQwen2Mixin(PerLayerMixin):
    config_class = PrunedQwen2Config
    resize = staticmethod(resize_llama_layer)


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
