"""Hunyuan V1 dense with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as stock
from transformers.models.hunyuan_v1_dense.configuration_hunyuan_v1_dense import HunYuanDenseV1Config

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedHunYuanDenseV1Config(PerLayerConfigMixin, HunYuanDenseV1Config):
    model_type = "pruned_hunyuan_v1_dense"


class PrunedHunYuanDenseV1Mixin(PerLayerMixin):
    config_class = PrunedHunYuanDenseV1Config
    layout = LLAMA_LAYOUT


class PrunedHunYuanDenseV1Model(PrunedHunYuanDenseV1Mixin, stock.HunYuanDenseV1Model): ...


class PrunedHunYuanDenseV1ForCausalLM(PrunedHunYuanDenseV1Mixin, stock.HunYuanDenseV1ForCausalLM): ...


class PrunedHunYuanDenseV1ForSequenceClassification(
    PrunedHunYuanDenseV1Mixin, stock.HunYuanDenseV1ForSequenceClassification
): ...
