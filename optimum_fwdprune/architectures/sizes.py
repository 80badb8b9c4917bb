"""The size of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelSizes:
    """The size of a model, for weights on any device; tied weights are counted once.

    Args:
        parameters (`int`): number of its parameters.
        bytes (`int`): size of the parameters in their dtypes, as in a safetensors file.
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
