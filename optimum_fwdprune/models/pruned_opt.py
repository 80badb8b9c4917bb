"""OPT with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.opt import modeling_opt as stock
from transformers.models.opt.configuration_opt import OPTConfig

from .layout import AttentionLayout, DecoderLayout, MLPLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedOPTConfig(PerLayerConfigMixin, OPTConfig):
    model_type = "pruned_opt"


class PrunedOPTMixin(PerLayerMixin):
    config_class = PrunedOPTConfig
    layout = DecoderLayout(
        AttentionLayout(
            module="self_attn",
            query="q_proj",
            key="k_proj",
            value="v_proj",
            output="out_proj",
            kv_heads_key=None,
            norms=("self_attn_layer_norm",),
        ),
        MLPLayout(sources=("fc1",), output="fc2", width_key="ffn_dim", norms=("final_layer_norm",)),
        layers="decoder.layers",
        attributes=lambda config: {"self_attn.num_heads": config.num_attention_heads},
        residual_adds_up=lambda config: config.do_layer_norm_before,
        normalizes_stream=lambda config: not config.do_layer_norm_before,
    )


class PrunedOPTModel(PrunedOPTMixin, stock.OPTModel): ...


class PrunedOPTForCausalLM(PrunedOPTMixin, stock.OPTForCausalLM): ...


class PrunedOPTForSequenceClassification(PrunedOPTMixin, stock.OPTForSequenceClassification): ...


class PrunedOPTForQuestionAnswering(PrunedOPTMixin, stock.OPTForQuestionAnswering): ...
