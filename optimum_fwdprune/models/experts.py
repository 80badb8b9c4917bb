"""The layout of a mixture of experts inside a decoder layer: its router, its experts, and the config keys of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .skipped import SkippedMLP


# Why no single channel of a mixture can be removed.
SAME_WIDTH = "its layers have experts, whose channels must be equally many in all experts of a model."


@dataclass(frozen=True)
class ExpertsLayout:
    """Names of the modules of a mixture of experts, and of their tensors that have an entry per expert.

    The decoder layers of a family may also have a dense MLP in the place of the mixture, under the same name.

    Args:
        module (`str`, defaults to `"mlp"`): name of the mixture inside the decoder layer. Shared experts, which are
            never removed, are parts of it too.
        router (`str`, defaults to `"gate"`): name of the router inside the mixture. It returns logits, weights and
            indices of the experts of every token.
        experts (`str`, defaults to `"experts"`): name of the module with all experts inside the mixture. It is called
            with hidden states, indices and weights.
        parameters (`tuple[str, ...]`, *optional*): parameters of this module; their first axis is the experts.
        router_tensors (`tuple[str, ...]`, *optional*): parameters and buffers of the router; their first axis is the
            experts.
        correction (`str`, *optional*): buffer of the router that is added to the scores by which experts are chosen,
            and not to their weights.
        count_key (`str`, defaults to `"num_experts"`): config key of the number of experts.
        chosen_key (`str`, defaults to `"num_experts_per_tok"`): config key of the number of experts of a token.
        groups_key (`str`, *optional*): config key of the number of groups, of equally many consecutive experts each.
        chosen_groups_key (`str`, *optional*): config key of the number of groups that a token chooses experts from.
        norms (`tuple[str, ...]`, *optional*): norms inside the decoder layer that only the mixture uses.
        skipped_class (`type`, defaults to `SkippedMLP`): class of the module that replaces a removed mixture.
    """

    module: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    parameters: tuple[str, ...] = ("gate_up_proj", "down_proj")
    router_tensors: tuple[str, ...] = ("weight",)
    correction: str = ""
    count_key: str = "num_experts"
    chosen_key: str = "num_experts_per_tok"
    groups_key: str | None = None
    chosen_groups_key: str | None = None
    norms: tuple[str, ...] = ("post_attention_layernorm",)
    skipped_class: type[nn.Module] = SkippedMLP

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules of the mixture inside the decoder layer, without norms."""
        return (self.module,)

    def is_in(self, layer: nn.Module) -> bool:
        """Whether a decoder layer has a mixture, and not a dense MLP in its place."""
        return hasattr(layer.get_submodule(self.module), self.experts)

    def skip_in(self, layer: nn.Module) -> None:
        """Remove the mixture, or the dense MLP in its place, from a decoder layer."""
        layer.set_submodule(self.module, self.skipped_class())

    def linear_sizes(self, config: Any) -> dict[str, dict[str, Any]]:
        """Return no sizes: the stock class builds mixtures with the number of experts in the config of the model."""
        return {}


class SkippedMixture(SkippedMLP):
    """Replaces a mixture that returns the weights of its experts in addition to its output."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):  # type: ignore[override]
        """Return zeros of the shape of `hidden_states`, and no weights."""
        return super().forward(hidden_states), None


# Routers that add a correction to the scores that choose experts, and choose groups of experts first (DeepSeek-V3).
GROUPED_EXPERTS = ExpertsLayout(
    router_tensors=("weight", "e_score_correction_bias"),
    correction="e_score_correction_bias",
    count_key="n_routed_experts",
    groups_key="n_group",
    chosen_groups_key="topk_group",
)
