"""SmolLM3 with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.smollm3 import modeling_smollm3 as stock
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedSmolLM3Config(PerLayerConfigMixin, SmolLM3Config):
    model_type = "pruned_smollm3"


class PrunedSmolLM3Mixin(PerLayerMixin):
    config_class = PrunedSmolLM3Config
    layout = LLAMA_LAYOUT


class PrunedSmolLM3Model(PrunedSmolLM3Mixin, stock.SmolLM3Model): ...


class PrunedSmolLM3ForCausalLM(PrunedSmolLM3Mixin, stock.SmolLM3ForCausalLM): ...


class PrunedSmolLM3ForSequenceClassification(PrunedSmolLM3Mixin, stock.SmolLM3ForSequenceClassification): ...


class PrunedSmolLM3ForTokenClassification(PrunedSmolLM3Mixin, stock.SmolLM3ForTokenClassification): ...


class PrunedSmolLM3ForQuestionAnswering(PrunedSmolLM3Mixin, stock.SmolLM3ForQuestionAnswering): ...
