"""Phi with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.phi import modeling_phi as stock
from transformers.models.phi.configuration_phi import PhiConfig

from .layout import LLAMA_LAYOUT, MLPLayout, grouped_attention
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedPhiConfig(PerLayerConfigMixin, PhiConfig):
    model_type = "pruned_phi"


class PrunedPhiMixin(PerLayerMixin):
    config_class = PrunedPhiConfig
    layout = replace(
        LLAMA_LAYOUT,
        # Attention and MLP read the same norm, which stays when one of them goes.
        attention=replace(LLAMA_LAYOUT.attention, output="dense", norms=()),
        mlp=MLPLayout(sources=("mlp.fc1",), output="mlp.fc2"),
        attributes=grouped_attention,
    )


class PrunedPhiModel(PrunedPhiMixin, stock.PhiModel): ...


class PrunedPhiForCausalLM(PrunedPhiMixin, stock.PhiForCausalLM): ...


class PrunedPhiForSequenceClassification(PrunedPhiMixin, stock.PhiForSequenceClassification): ...


class PrunedPhiForTokenClassification(PrunedPhiMixin, stock.PhiForTokenClassification): ...
