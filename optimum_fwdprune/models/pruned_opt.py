"""OPT with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
)

from .per_layer import PerLayerConfigMixin, PerLayerMixin, resize_linear


@strict
class PrunedOPTConfig(PerLayerConfigMixin, OPTConfig):
    model_type = "pruned_opt"

    attention_output_bias: bool = False
    mlp_output_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        # The stock config derives it from the number of heads, which no longer divides the hidden size.
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class PrunedOPTMixin(PerLayerMixin):
    config_class = PrunedOPTConfig
    layers_path = "decoder.layers"

    @staticmethod
    def resize(layer, config):
        attention = layer.self_attn
        features = config.num_attention_heads * attention.head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            resize_linear(attention, name, out_features=features)
        resize_linear(attention, "out_proj", in_features=features, add_bias=config.attention_output_bias)
        attention.num_heads = config.num_attention_heads

        resize_linear(layer, "fc1", out_features=config.ffn_dim)
        resize_linear(layer, "fc2", in_features=config.ffn_dim, add_bias=config.mlp_output_bias)


class PrunedOPTModel(PrunedOPTMixin, OPTModel):
    pass


class PrunedOPTForCausalLM(PrunedOPTMixin, OPTForCausalLM):
    pass


class PrunedOPTForSequenceClassification(PrunedOPTMixin, OPTForSequenceClassification):
    pass


class PrunedOPTForQuestionAnswering(PrunedOPTMixin, OPTForQuestionAnswering):
    pass
