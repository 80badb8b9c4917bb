"""BLOOM with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.bloom import modeling_bloom as stock
from transformers.models.bloom.configuration_bloom import BloomConfig

from .layout import AttentionLayout, DecoderLayout, MLPLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin
from .skipped import SkippedAttention, SkippedMLP, count_tokens


@strict
class PrunedBloomConfig(PerLayerConfigMixin, BloomConfig):
    model_type = "pruned_bloom"

    intermediate_size: int | None = None
    kept_heads: list[int] | None = None

    def __post_init__(self, **kwargs):
        # Before the base class makes `n_head` a per-layer attribute, which the global config then refuses to read.
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.kept_heads is None:
            self.kept_heads = list(range(self.n_head))
        super().__post_init__(**kwargs)


class PrunedBloomAttention(stock.BloomAttention):
    """Attention over the heads `kept_heads`, each with the ALiBi slope that it had in the dense model."""

    kept_heads: list[int]

    def forward(self, hidden_states, residual, alibi, attention_mask, **kwargs):
        batch_size, length = hidden_states.shape[0], alibi.shape[-1]
        alibi = alibi.view(batch_size, -1, 1, length)[:, self.kept_heads].flatten(0, 1)
        return super().forward(hidden_states, residual, alibi, attention_mask, **kwargs)


class SkippedBloomAttention(SkippedAttention):
    """BLOOM's attention adds the residual stream itself, and what remains of it is the stream."""

    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, **kwargs):
        count_tokens(layer_past, self.layer_idx, hidden_states)
        return residual, None


class SkippedBloomMLP(SkippedMLP):
    """BLOOM's MLP adds the residual stream itself, and what remains of it is the stream."""

    def forward(self, hidden_states, residual, *args, **kwargs):
        return residual


class PrunedBloomMixin(PerLayerMixin):
    config_class = PrunedBloomConfig
    layout = DecoderLayout(
        AttentionLayout(
            module="self_attention",
            fused="query_key_value",
            interleaved=True,
            output="dense",
            heads_key="n_head",
            kv_heads_key=None,
            kept_heads_key="kept_heads",
            pruned_class=PrunedBloomAttention,
            norms=("input_layernorm",),
            skipped_class=SkippedBloomAttention,
        ),
        MLPLayout(
            sources=("mlp.dense_h_to_4h",),
            output="mlp.dense_4h_to_h",
            norms=("post_attention_layernorm",),
            skipped_class=SkippedBloomMLP,
        ),
        layers="h",
        attributes=lambda config: {
            "self_attention.num_heads": config.n_head,
            "self_attention.kept_heads": config.kept_heads,
            # The exact-but-slow path slices the projections by the dense sizes; the fast one computes the same sum.
            "self_attention.slow_but_exact": False,
            "mlp.slow_but_exact": False,
        },
        residual_adds_up=lambda config: not config.apply_residual_connection_post_layernorm,
        normalizes_stream=lambda config: config.apply_residual_connection_post_layernorm,
    )


class PrunedBloomModel(PrunedBloomMixin, stock.BloomModel): ...


class PrunedBloomForCausalLM(PrunedBloomMixin, stock.BloomForCausalLM): ...


class PrunedBloomForSequenceClassification(PrunedBloomMixin, stock.BloomForSequenceClassification): ...


class PrunedBloomForTokenClassification(PrunedBloomMixin, stock.BloomForTokenClassification): ...


class PrunedBloomForQuestionAnswering(PrunedBloomMixin, stock.BloomForQuestionAnswering): ...
