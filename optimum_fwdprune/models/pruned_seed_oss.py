"""Seed-OSS with per-layer sizes."""

from huggingface_hub.dataclasses import strict
from transformers.models.seed_oss import modeling_seed_oss as stock
from transformers.models.seed_oss.configuration_seed_oss import SeedOssConfig

from .layout import LLAMA_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedSeedOssConfig(PerLayerConfigMixin, SeedOssConfig):
    model_type = "pruned_seed_oss"


class PrunedSeedOssMixin(PerLayerMixin):
    config_class = PrunedSeedOssConfig
    layout = LLAMA_LAYOUT


class PrunedSeedOssModel(PrunedSeedOssMixin, stock.SeedOssModel): ...


class PrunedSeedOssForCausalLM(PrunedSeedOssMixin, stock.SeedOssForCausalLM): ...


class PrunedSeedOssForSequenceClassification(PrunedSeedOssMixin, stock.SeedOssForSequenceClassification): ...


class PrunedSeedOssForTokenClassification(PrunedSeedOssMixin, stock.SeedOssForTokenClassification): ...


class PrunedSeedOssForQuestionAnswering(PrunedSeedOssMixin, stock.SeedOssForQuestionAnswering): ...
