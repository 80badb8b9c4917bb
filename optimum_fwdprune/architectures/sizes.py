"""How large a model is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelSizes:
    """Size of a model, wherever its weights lie; tied weights are counted once.

    Args:
        parameters (`int`): number of its parameters.
        bytes (`int`): size of these in their dtypes, as a safetensors file holds them.
        tensors (`int`): number of tensors that hold them.
    """

    parameters: int
    bytes: int
    tensors: int

    @classmethod
    def of(cls, model: nn.Module) -> ModelSizes:
        """Return the sizes of `model`, which may be on the meta device."""
        weights = list(model.parameters())
        return cls(
            parameters=sum(weight.numel() for weight in weights),
            bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            tensors=len(weights),
        )
