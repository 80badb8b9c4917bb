"""The multimodal models of Gemma 3 with per-layer sizes of the language model."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3 import modeling_gemma3 as stock
from transformers.models.gemma3.configuration_gemma3 import Gemma3Config

from .multimodal import MultimodalConfigMixin, in_language_model
from .per_layer import PerLayerMixin
from .pruned_gemma3_text import PrunedGemma3TextConfig, PrunedGemma3TextMixin


@strict
class PrunedGemma3Config(MultimodalConfigMixin, Gemma3Config):
    model_type = "pruned_gemma3"
    text_config_classes = (PrunedGemma3TextConfig,)


class PrunedGemma3Mixin(PerLayerMixin):
    config_class = PrunedGemma3Config
    layout = in_language_model(PrunedGemma3TextMixin.layout)


class PrunedGemma3Model(PrunedGemma3Mixin, stock.Gemma3Model): ...


class PrunedGemma3ForConditionalGeneration(PrunedGemma3Mixin, stock.Gemma3ForConditionalGeneration):
    auto_classes = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")


class PrunedGemma3ForSequenceClassification(PrunedGemma3Mixin, stock.Gemma3ForSequenceClassification): ...
