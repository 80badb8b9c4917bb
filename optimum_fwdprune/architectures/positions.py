"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """Return the number of positions that a model was made for; `None` where its config names none, as with ALiBi.

    Args:
        config (`PreTrainedConfig`): its config, also that of a multimodal model, whose text model is meant.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(length: int, config: Any, name: str = "max_length") -> None:
    """Raise `ValueError` where a sequence is longer than the positions of a model.

    Args:
        length (`int`): number of tokens.
        config (`PreTrainedConfig`): config of the model.
        name (`str`, defaults to `"max_length"`): the option that sets the length.
    """
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise ValueError(f"{name}={length} is more than the {positions} positions of the model.")
