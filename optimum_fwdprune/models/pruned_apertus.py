"""Apertus with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.apertus import modeling_apertus as stock
from transformers.models.apertus.configuration_apertus import ApertusConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedApertusConfig(PerLayerConfigMixin, ApertusConfig):
    model_type = "pruned_apertus"


class PrunedApertusMixin(PerLayerMixin):
    config_class = PrunedApertusConfig
    layout = replace(
        LLAMA_LAYOUT,
        attention=replace(LLAMA_LAYOUT.attention, norms=("attention_layernorm",)),
        mlp=replace(LLAMA_LAYOUT.mlp, sources=("mlp.up_proj",), norms=("feedforward_layernorm",)),
    )


class PrunedApertusModel(PrunedApertusMixin, stock.ApertusModel): ...


class PrunedApertusForCausalLM(PrunedApertusMixin, stock.ApertusForCausalLM): ...


class PrunedApertusForTokenClassification(PrunedApertusMixin, stock.ApertusForTokenClassification): ...
