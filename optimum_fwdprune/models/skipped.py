"""Modules that replace a removed attention or MLP in a decoder layer, and add nothing to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SkippedAttention(nn.Module):
    """Replaces the attention of a decoder layer without attention.

    Args:
        layer_idx (`int`): index of the decoder layer, under which caches store keys and values.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *args, past_key_values: Any = None, layer_past: Any = None, **kwargs
    ):
        """Return zeros of the shape of `hidden_states`, and no attention weights."""
        # Families pass the cache under one of two names.
        count_tokens(past_key_values if layer_past is None else layer_past, self.layer_idx, hidden_states)
        return torch.zeros_like(hidden_states), None


class SkippedMLP(nn.Module):
    """Replaces the MLP of a decoder layer without an MLP."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Return zeros of the shape of `hidden_states`."""
        return torch.zeros_like(hidden_states)


def count_tokens(cache: Any, layer_idx: int, hidden_states: torch.Tensor) -> None:
    """Let a cache count the tokens of a layer without attention.

    A cache that is made from the config of the model stores nothing for such a layer (`kv_sharing_modes`), and is not
    changed. A cache that was made without the config, or by a transformers version without this feature, may take its
    length from this layer. It stores one number per token instead of keys and values.

    Args:
        cache (`Cache`, *optional*): the cache of keys and values.
        layer_idx (`int`): index of the layer.
        hidden_states (`Tensor[batch, tokens, hidden]`): inputs of the layer.
    """
    if cache is None:
        return
    holds_nothing = getattr(cache, "is_dummy", ())
    if layer_idx < len(holds_nothing) and holds_nothing[layer_idx]:
        return
    numbers = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
    cache.update(numbers, numbers, layer_idx)
