"""Nemotron with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.nemotron import modeling_nemotron as stock
from transformers.models.nemotron.configuration_nemotron import NemotronConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedNemotronConfig(PerLayerConfigMixin, NemotronConfig):
    model_type = "pruned_nemotron"


class PrunedNemotronMixin(PerLayerMixin):
    config_class = PrunedNemotronConfig
    layout = replace(
        LLAMA_LAYOUT,
        mlp=replace(LLAMA_LAYOUT.mlp, sources=("mlp.up_proj",)),
    )


class PrunedNemotronModel(PrunedNemotronMixin, stock.NemotronModel): ...


class PrunedNemotronForCausalLM(PrunedNemotronMixin, stock.NemotronForCausalLM): ...


class PrunedNemotronForSequenceClassification(PrunedNemotronMixin, stock.NemotronForSequenceClassification): ...


class PrunedNemotronForTokenClassification(PrunedNemotronMixin, stock.NemotronForTokenClassification): ...


class PrunedNemotronForQuestionAnswering(PrunedNemotronMixin, stock.NemotronForQuestionAnswering): ...
