"""The router and the experts of a site whose units are experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Routing:
    """The modules of a mixture that choose and run experts, and what limits the number of experts.

    Args:
        router (`nn.Module`): returns logits `[tokens, experts]`, and weights and indices `[tokens, chosen]`.
        experts (`nn.Module`): is called with hidden states `[tokens, hidden]`, indices and weights.
        experts_name (`str`): name of this module inside the model.
        chosen (`int`): number of experts of a token.
        fewest (`int`): smallest number of experts that the router can choose from.
        correction (`str`, *optional*): name of the router's buffer that is added to the scores by which experts are
            chosen, and not to their weights.
    """

    router: nn.Module
    experts: nn.Module
    experts_name: str
    chosen: int
    fewest: int
    correction: str = ""

    @property
    def can_be_refitted(self) -> bool:
        """Whether the experts have the parts that transformers' experts share: an activation of gate and up rows, and
        an output projection after which nothing follows."""
        experts: Any = self.experts
        return hasattr(experts, "_apply_gate") and not getattr(experts, "has_post_expert_norm", False)

    @property
    def output_name(self) -> str:
        """Name of the parameter with the output projections of all experts, inside the module of the experts."""
        return "down_proj"

    def output_weight(self, expert: int) -> torch.Tensor:
        """Return the output projection of an expert, `[hidden, features]`, a view of the model's parameter."""
        return self.as_stored(getattr(self.experts, self.output_name)[expert])

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Return an output projection, `[hidden, features]`, as the model stores it, or the other way round."""
        return weight.T if getattr(self.experts, "is_transposed", False) else weight

    def features(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the output projection of an expert, `[tokens, features]`.

        Args:
            expert (`int`): index of the expert.
            hidden (`Tensor[tokens, hidden]`): inputs of the expert.
        """
        experts: Any = self.experts
        weight = experts.gate_up_proj[expert]
        rows = hidden @ (weight if getattr(experts, "is_transposed", False) else weight.T)
        if getattr(experts, "has_bias", False):
            rows = rows + experts.gate_up_proj_bias[expert]
        return experts._apply_gate(rows)
