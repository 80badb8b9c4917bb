"""LLaVA with per-layer sizes of its language model, a Llama or a Mistral."""

from huggingface_hub.dataclasses import strict
from transformers.models.llava import modeling_llava as stock
from transformers.models.llava.configuration_llava import LlavaConfig

from .layout import LLAMA_LAYOUT
from .multimodal import MultimodalConfigMixin, in_language_model
from .per_layer import PerLayerMixin
from .pruned_llama import PrunedLlamaConfig
from .pruned_mistral import PrunedMistralConfig


@strict
class PrunedLlavaConfig(MultimodalConfigMixin, LlavaConfig):
    model_type = "pruned_llava"
    text_config_classes = (PrunedLlamaConfig, PrunedMistralConfig)


class PrunedLlavaMixin(PerLayerMixin):
    config_class = PrunedLlavaConfig
    layout = in_language_model(LLAMA_LAYOUT)


class PrunedLlavaModel(PrunedLlavaMixin, stock.LlavaModel): ...


class PrunedLlavaForConditionalGeneration(PrunedLlavaMixin, stock.LlavaForConditionalGeneration):
    auto_classes = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
