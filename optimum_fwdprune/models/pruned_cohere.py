"""Cohere with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.cohere import modeling_cohere as stock
from transformers.models.cohere.configuration_cohere import CohereConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedCohereConfig(PerLayerConfigMixin, CohereConfig):
    model_type = "pruned_cohere"


class PrunedCohereMixin(PerLayerMixin):
    config_class = PrunedCohereConfig
    layout = replace(
        LLAMA_LAYOUT,
        # Attention and MLP read the same norm, which stays when one of them goes.
        attention=replace(LLAMA_LAYOUT.attention, norms=(), query_norms="q_norm", key_norms="k_norm"),
        mlp=replace(LLAMA_LAYOUT.mlp, norms=()),
    )


class PrunedCohereModel(PrunedCohereMixin, stock.CohereModel): ...


class PrunedCohereForCausalLM(PrunedCohereMixin, stock.CohereForCausalLM): ...
