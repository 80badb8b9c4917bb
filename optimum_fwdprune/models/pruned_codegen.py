"""CodeGen with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.codegen import modeling_codegen as stock
from transformers.models.codegen.configuration_codegen import CodeGenConfig

from .layout import AttentionLayout, DecoderLayout, MLPLayout
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedCodeGenConfig(PerLayerConfigMixin, CodeGenConfig):
    model_type = "pruned_codegen"


class PrunedCodeGenMixin(PerLayerMixin):
    config_class = PrunedCodeGenConfig
    layout = DecoderLayout(
        # Its attention divides heads among four blocks, one for each processor that the model was trained on.
        AttentionLayout(
            module="attn", fused="qkv_proj", blocks=4, output="out_proj", heads_key="n_head", kv_heads_key=None
        ),
        MLPLayout(sources=("mlp.fc_in",), output="mlp.fc_out", width_key="n_inner"),
        layers="h",
        # Transformers 5.24 and later split the fused rows by `embed_dim`.
        attributes=lambda config: {
            "attn.num_attention_heads": config.n_head,
            "attn.embed_dim": config.n_head * config.head_dim,
        },
    )


class PrunedCodeGenModel(PrunedCodeGenMixin, stock.CodeGenModel): ...


class PrunedCodeGenForCausalLM(PrunedCodeGenMixin, stock.CodeGenForCausalLM): ...
