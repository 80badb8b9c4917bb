"""Errors where the Hub must not be asked: they name the reason and the way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# Variables that forbid to ask the Hub, the most usual one first.
VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@contextmanager
def naming_offline(name: str | Path, otherwise: str) -> Iterator[None]:
    """Raise an `OSError` that names the variable that forbids to ask the Hub, where that is why something is missing.

    Args:
        name (`str` or `Path`): the model or dataset that is loaded while the context is open.
        otherwise (`str`): what the user can do instead of asking the Hub, in the imperative.
    """
    from huggingface_hub import is_offline_mode

    try:
        yield
    except (OSError, ValueError) as error:
        unreachable = isinstance(error, ConnectionError) or any(
            words in str(error) for words in ("couldn't connect to", "Couldn't find cache")
        )
        if not is_offline_mode() or not unreachable or Path(name).exists():
            raise
        raise OSError(
            f"{name} is neither here nor in the cache of the Hub, and {offline_variable()} is set, which forbids to "
            f"download it. Unset it to download {name}, or {otherwise}."
        ) from error


def offline_variable() -> str:
    """Return the name of the environment variable that forbids to ask the Hub."""
    return next((name for name in VARIABLES if os.environ.get(name)), VARIABLES[0])
