"""GPT-NeoX with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.gpt_neox import modeling_gpt_neox as stock
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig

from .layout import AttentionLayout, DecoderLayout, MLPLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGPTNeoXConfig(PerLayerConfigMixin, GPTNeoXConfig):
    model_type = "pruned_gpt_neox"


class PrunedGPTNeoXMixin(PerLayerMixin):
    config_class = PrunedGPTNeoXConfig
    layout = DecoderLayout(
        AttentionLayout(
            module="attention",
            fused="query_key_value",
            interleaved=True,
            output="dense",
            head_dim="head_size",
            kv_heads_key=None,
            norms=("input_layernorm",),
        ),
        MLPLayout(sources=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h", norms=("post_attention_layernorm",)),
    )


class PrunedGPTNeoXModel(PrunedGPTNeoXMixin, stock.GPTNeoXModel): ...


class PrunedGPTNeoXForCausalLM(PrunedGPTNeoXMixin, stock.GPTNeoXForCausalLM): ...


class PrunedGPTNeoXForSequenceClassification(PrunedGPTNeoXMixin, stock.GPTNeoXForSequenceClassification): ...


class PrunedGPTNeoXForTokenClassification(PrunedGPTNeoXMixin, stock.GPTNeoXForTokenClassification): ...


class PrunedGPTNeoXForQuestionAnswering(PrunedGPTNeoXMixin, stock.GPTNeoXForQuestionAnswering): ...
