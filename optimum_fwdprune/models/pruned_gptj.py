"""GPT-J with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.gptj import modeling_gptj as stock
from transformers.models.gptj.configuration_gptj import GPTJConfig

from .layout import AttentionLayout, DecoderLayout, MLPLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGPTJConfig(PerLayerConfigMixin, GPTJConfig):
    model_type = "pruned_gptj"


class PrunedGPTJMixin(PerLayerMixin):
    config_class = PrunedGPTJConfig
    layout = DecoderLayout(
        AttentionLayout(
            module="attn",
            query="q_proj",
            key="k_proj",
            value="v_proj",
            output="out_proj",
            heads_key="n_head",
            kv_heads_key=None,
        ),
        MLPLayout(sources=("mlp.fc_in",), output="mlp.fc_out", width_key="n_inner"),
        layers="h",
        attributes=lambda config: {"attn.num_attention_heads": config.n_head},
    )


class PrunedGPTJModel(PrunedGPTJMixin, stock.GPTJModel): ...


class PrunedGPTJForCausalLM(PrunedGPTJMixin, stock.GPTJForCausalLM): ...


class PrunedGPTJForSequenceClassification(PrunedGPTJMixin, stock.GPTJForSequenceClassification): ...


class PrunedGPTJForQuestionAnswering(PrunedGPTJMixin, stock.GPTJForQuestionAnswering): ...
