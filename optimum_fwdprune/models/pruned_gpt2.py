"""GPT-2 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.models.gpt2.configuration_gpt2 import GPT2Config

from .layout import AttentionLayout, DecoderLayout, MLPLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGPT2Config(PerLayerConfigMixin, GPT2Config):
    model_type = "pruned_gpt2"


class PrunedGPT2Mixin(PerLayerMixin):
    config_class = PrunedGPT2Config
    layout = DecoderLayout(
        AttentionLayout(
            module="attn", fused="c_attn", output="c_proj", heads_key="n_head", kv_heads_key=None, norms=("ln_1",)
        ),
        MLPLayout(sources=("mlp.c_fc",), output="mlp.c_proj", width_key="n_inner", norms=("ln_2",)),
        layers="h",
        attributes=lambda config: {
            "attn.num_heads": config.n_head,
            "attn.split_size": config.n_head * config.head_dim,
        },
        # Attention to an encoder, which a decoder alone does not have.
        whole=("crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj"),
    )


class PrunedGPT2Model(PrunedGPT2Mixin, stock.GPT2Model): ...


class PrunedGPT2ForCausalLM(PrunedGPT2Mixin, stock.GPT2LMHeadModel): ...


class PrunedGPT2ForSequenceClassification(PrunedGPT2Mixin, stock.GPT2ForSequenceClassification): ...


class PrunedGPT2ForTokenClassification(PrunedGPT2Mixin, stock.GPT2ForTokenClassification): ...


class PrunedGPT2ForQuestionAnswering(PrunedGPT2Mixin, stock.GPT2ForQuestionAnswering): ...
