"""How the outputs of projections join the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from ..loading.subject import Subject


@dataclass(frozen=True)
class Joining:
    """How the outputs of projections are added to the residual stream.

    Args:
        normalized (`bool`, defaults to `False`): whether they pass a norm before, so that the target of a projection
            is its output in the dense model instead of the dense model's stream.
        multiplier (`float`, defaults to 1.0): the number that they are multiplied by before they are added.
    """

    normalized: bool = False
    multiplier: float = 1.0

    @classmethod
    def of(cls, subject: Subject) -> Joining:
        """Return the values that the layout of a model declares."""
        layout, config = subject.architecture.layout, subject.text_config
        return cls(layout.output_norm, layout.residual_multiplier(config))
