"""Falcon with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.falcon import modeling_falcon as stock
from transformers.models.falcon.configuration_falcon import FalconConfig

from .layout import AttentionLayout, DecoderLayout, MLPLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedFalconConfig(PerLayerConfigMixin, FalconConfig):
    model_type = "pruned_falcon"

    # A property of the stock config, which divides the hidden size by a number of heads that layers differ in.
    head_dim: int | None = None
    # The stock config has as many KV heads as heads also where all heads share one (`multi_query`).
    kv_heads: int | None = None
    kept_heads: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.kept_heads is None:
            self.kept_heads = list(range(self.num_attention_heads))
        super().__post_init__(**kwargs)


class PrunedFalconAttention(stock.FalconAttention):
    """Attention over the heads `kept_heads`, each with the ALiBi slope that it had in the dense model."""

    kept_heads: list[int]

    def forward(self, hidden_states, alibi, attention_mask, **kwargs):
        if alibi is not None:
            # The mask holds the slopes as well.
            alibi, attention_mask = alibi[:, self.kept_heads], attention_mask[:, self.kept_heads]
        return super().forward(hidden_states, alibi=alibi, attention_mask=attention_mask, **kwargs)


class PrunedFalconMixin(PerLayerMixin):
    config_class = PrunedFalconConfig
    layout = DecoderLayout(
        AttentionLayout(
            module="self_attention",
            fused="query_key_value",
            interleaved=True,
            output="dense",
            kv_heads_key="kv_heads",
            kept_heads_key="kept_heads",
            pruned_class=PrunedFalconAttention,
            norms=("input_layernorm", "ln_attn"),
        ),
        MLPLayout(
            sources=("mlp.dense_h_to_4h",),
            output="mlp.dense_4h_to_h",
            width_key="ffn_hidden_size",
            norms=("post_attention_layernorm", "ln_mlp"),
        ),
        layers="h",
        attributes=lambda config: {
            "self_attention.num_heads": config.num_attention_heads,
            "self_attention.num_kv_heads": config.kv_heads,
            "self_attention.kept_heads": config.kept_heads,
        },
        shares_norms=lambda config: (
            config.parallel_attn
            and not (config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2))
        ),
    )


class PrunedFalconModel(PrunedFalconMixin, stock.FalconModel): ...


class PrunedFalconForCausalLM(PrunedFalconMixin, stock.FalconForCausalLM): ...


class PrunedFalconForSequenceClassification(PrunedFalconMixin, stock.FalconForSequenceClassification): ...


class PrunedFalconForTokenClassification(PrunedFalconMixin, stock.FalconForTokenClassification): ...


class PrunedFalconForQuestionAnswering(PrunedFalconMixin, stock.FalconForQuestionAnswering): ...
