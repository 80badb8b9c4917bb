"""gpt-oss with per-layer sizes."""

from dataclasses import replace

from huggingface_hub.dataclasses import strict
from transformers.models.gpt_oss import modeling_gpt_oss as stock
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

from .experts import ExpertsLayout, SkippedMixture
from .mixtures import MIXTURE_LAYOUT
from .per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class PrunedGptOssConfig(PerLayerConfigMixin, GptOssConfig):
    model_type = "pruned_gpt_oss"


class PrunedGptOssMixin(PerLayerMixin):
    config_class = PrunedGptOssConfig
    layout = replace(
        MIXTURE_LAYOUT,
        # Every query head has a sink, a logit that takes a part of its attention.
        attention=replace(MIXTURE_LAYOUT.attention, per_head=("sinks",)),
        experts=ExpertsLayout(
            router="router",
            parameters=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
            router_tensors=("weight", "bias"),
            count_key="num_local_experts",
            skipped_class=SkippedMixture,
        ),
    )


class PrunedGptOssModel(PrunedGptOssMixin, stock.GptOssModel): ...


class PrunedGptOssForCausalLM(PrunedGptOssMixin, stock.GptOssForCausalLM): ...


class PrunedGptOssForSequenceClassification(PrunedGptOssMixin, stock.GptOssForSequenceClassification): ...


class PrunedGptOssForTokenClassification(PrunedGptOssMixin, stock.GptOssForTokenClassification): ...
