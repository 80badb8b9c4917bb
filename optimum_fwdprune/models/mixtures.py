"""Layouts that several families with mixtures of experts share."""

from dataclasses import replace

from .experts import ExpertsLayout
from .layout import LLAMA_LAYOUT, DecoderLayout, grouped_attention


# The attention of LLaMA, and a mixture in every layer, whose config has the number of experts as `num_local_experts`.
MIXTURE_LAYOUT = DecoderLayout(
    LLAMA_LAYOUT.attention, experts=ExpertsLayout(count_key="num_local_experts"), attributes=grouped_attention
)

# The same with LLaMA's MLP in the place of the mixture in some layers.
SPARSE_LAYOUT = replace(MIXTURE_LAYOUT, mlp=LLAMA_LAYOUT.mlp, experts=ExpertsLayout())
