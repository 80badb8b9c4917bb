"""BLOOM with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.bloom.configuration_bloom import BloomConfig
from transformers.models.bloom.modeling_bloom import (
    BloomAttention,
    BloomForCausalLM,
    BloomForQuestionAnswering,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    BloomModel,
)

from .per_layer import PerLayerConfigMixin, PerLayerMixin, resize_linear


@strict
class PrunedBloomConfig(PerLayerConfigMixin, BloomConfig):
    model_type = "pruned_bloom"

    attention_output_bias: bool = False
    mlp_output_bias: bool = False
    head_dim: int | None = None
    intermediate_size: int | None = None
    kept_heads: list[int] | None = None

    def __post_init__(self, **kwargs):
        # Before the base class makes `n_head` a per-layer attribute, which the global config then refuses to read.
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.n_head
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.kept_heads is None:
            self.kept_heads = list(range(self.n_head))
        super().__post_init__(**kwargs)


class PrunedBloomAttention(BloomAttention):
    """Attention over the heads `kept_heads`, each with the ALiBi slope that it had in the dense model."""

    kept_heads: list[int]

    def forward(self, hidden_states, residual, alibi, attention_mask, **kwargs):
        batch_size, length = hidden_states.shape[0], alibi.shape[-1]
        alibi = alibi.view(batch_size, -1, 1, length)[:, self.kept_heads].flatten(0, 1)
        return super().forward(hidden_states, residual, alibi, attention_mask, **kwargs)


class PrunedBloomMixin(PerLayerMixin):
    config_class = PrunedBloomConfig
    layers_path = "h"

    @staticmethod
    def resize(layer, config):
        attention, mlp = layer.self_attention, layer.mlp
        attention.__class__ = PrunedBloomAttention
        attention.kept_heads = config.kept_heads
        attention.num_heads = config.n_head
        features = config.n_head * attention.head_dim
        resize_linear(attention, "query_key_value", out_features=3 * features)
        resize_linear(attention, "dense", in_features=features)

        resize_linear(mlp, "dense_h_to_4h", out_features=config.intermediate_size)
        resize_linear(mlp, "dense_4h_to_h", in_features=config.intermediate_size)
        # The exact-but-slow path slices the projections by the dense sizes; the fast one computes the same sum.
        attention.slow_but_exact = mlp.slow_but_exact = False


class PrunedBloomModel(PrunedBloomMixin, BloomModel):
    pass


class PrunedBloomForCausalLM(PrunedBloomMixin, BloomForCausalLM):
    pass


class PrunedBloomForSequenceClassification(PrunedBloomMixin, BloomForSequenceClassification):
    pass


class PrunedBloomForTokenClassification(PrunedBloomMixin, BloomForTokenClassification):
    pass


class PrunedBloomForQuestionAnswering(PrunedBloomMixin, BloomForQuestionAnswering):
    pass
