"""StarCoder2 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.starcoder2 import modeling_starcoder2 as stock
from transformers.models.starcoder2.configuration_starcoder2 import Starcoder2Config

from .layout import LLAMA_LAYOUT, grouped_attention
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedStarcoder2Config(PerLayerConfigMixin, Starcoder2Config):
    model_type = "pruned_starcoder2"


class PrunedStarcoder2Mixin(PerLayerMixin):
    config_class = PrunedStarcoder2Config
    layout = replace(
        LLAMA_LAYOUT,
        mlp=replace(LLAMA_LAYOUT.mlp, sources=("mlp.c_fc",), output="mlp.c_proj"),
        attributes=grouped_attention,
    )


class PrunedStarcoder2Model(PrunedStarcoder2Mixin, stock.Starcoder2Model): ...


class PrunedStarcoder2ForCausalLM(PrunedStarcoder2Mixin, stock.Starcoder2ForCausalLM): ...


class PrunedStarcoder2ForSequenceClassification(PrunedStarcoder2Mixin, stock.Starcoder2ForSequenceClassification): ...


class PrunedStarcoder2ForTokenClassification(PrunedStarcoder2Mixin, stock.Starcoder2ForTokenClassification): ...
