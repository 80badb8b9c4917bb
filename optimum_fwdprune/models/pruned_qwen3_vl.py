"""Qwen3-VL with per-layer sizes of its language model."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig

from .layout import LLAMA_LAYOUT
from .multimodal import MultimodalConfigMixin, in_language_model
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen3VLTextConfig(PerLayerConfigMixin, Qwen3VLTextConfig):
    model_type = "pruned_qwen3_vl_text"


@strict
class PrunedQwen3VLConfig(MultimodalConfigMixin, Qwen3VLConfig):
    model_type = "pruned_qwen3_vl"
    text_config_classes = (PrunedQwen3VLTextConfig,)


class PrunedQwen3VLMixin(PerLayerMixin):
    config_class = PrunedQwen3VLConfig
    # DeepStack adds features of an image to the stream after each of the first layers.
    layout = replace(
        in_language_model(LLAMA_LAYOUT),
        first_layers=lambda config: len(config.vision_config.deepstack_visual_indexes),
    )


class PrunedQwen3VLModel(PrunedQwen3VLMixin, stock.Qwen3VLModel): ...


class PrunedQwen3VLForConditionalGeneration(PrunedQwen3VLMixin, stock.Qwen3VLForConditionalGeneration):
    auto_classes = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
