"""The text models of Gemma 3 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3 import modeling_gemma3 as stock
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGemma3TextConfig(PerLayerConfigMixin, Gemma3TextConfig):
    model_type = "pruned_gemma3_text"


class PrunedGemma3TextMixin(PerLayerMixin):
    config_class = PrunedGemma3TextConfig
    layout = replace(
        LLAMA_LAYOUT,
        attention=replace(LLAMA_LAYOUT.attention, norms=("input_layernorm", "post_attention_layernorm")),
        mlp=replace(LLAMA_LAYOUT.mlp, norms=("pre_feedforward_layernorm", "post_feedforward_layernorm")),
        output_norm=True,
    )


class PrunedGemma3TextModel(PrunedGemma3TextMixin, stock.Gemma3TextModel): ...


class PrunedGemma3ForCausalLM(PrunedGemma3TextMixin, stock.Gemma3ForCausalLM): ...


class PrunedGemma3TextForSequenceClassification(PrunedGemma3TextMixin, stock.Gemma3TextForSequenceClassification): ...
