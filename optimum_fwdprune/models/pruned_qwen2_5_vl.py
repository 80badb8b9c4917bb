"""Qwen2.5-VL with per-layer sizes of its language model."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

from .layout import LLAMA_LAYOUT
from .multimodal import MultimodalConfigMixin, in_language_model
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedQwen2_5_VLTextConfig(PerLayerConfigMixin, Qwen2_5_VLTextConfig):
    model_type = "pruned_qwen2_5_vl_text"


@strict
class PrunedQwen2_5_VLConfig(MultimodalConfigMixin, Qwen2_5_VLConfig):
    model_type = "pruned_qwen2_5_vl"
    text_config_classes = (PrunedQwen2_5_VLTextConfig,)


class PrunedQwen2_5_VLMixin(PerLayerMixin):
    config_class = PrunedQwen2_5_VLConfig
    layout = in_language_model(LLAMA_LAYOUT)


class PrunedQwen2_5_VLModel(PrunedQwen2_5_VLMixin, stock.Qwen2_5_VLModel): ...


class PrunedQwen2_5_VLForConditionalGeneration(PrunedQwen2_5_VLMixin, stock.Qwen2_5_VLForConditionalGeneration):
    auto_classes = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
