"""Cohere 2 with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.cohere2 import modeling_cohere2 as stock
from transformers.models.cohere2.configuration_cohere2 import Cohere2Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedCohere2Config(PerLayerConfigMixin, Cohere2Config):
    model_type = "pruned_cohere2"


class PrunedCohere2Mixin(PerLayerMixin):
    config_class = PrunedCohere2Config
    layout = replace(
        LLAMA_LAYOUT,
        # Attention and MLP read the same norm, which stays when one of them goes.
        attention=replace(LLAMA_LAYOUT.attention, norms=()),
        mlp=replace(LLAMA_LAYOUT.mlp, norms=()),
    )


class PrunedCohere2Model(PrunedCohere2Mixin, stock.Cohere2Model): ...


class PrunedCohere2ForCausalLM(PrunedCohere2Mixin, stock.Cohere2ForCausalLM): ...
