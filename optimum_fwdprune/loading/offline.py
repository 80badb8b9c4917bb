"""Errors in offline mode, which name the environment variable that sets it, and the way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..words import did_you_mean


# Environment variables that set the offline mode, the most common one first.
VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@contextmanager
def naming_offline(name: str | Path, otherwise: str) -> Iterator[None]:
    """Turn an error of loading that offline mode causes into an `OSError` that names the variable and the way out.

    Args:
        name (`str` or `Path`): the model or dataset that is loaded while the context is open.
        otherwise (`str`): a way out other than downloading, in the imperative.
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
            f"{name} is neither a local file nor in the cache of the Hub, and {offline_variable()} is set, which "
            f"prevents downloads. Unset it to download {name}, or {otherwise}.{_near(Path(name))}"
        ) from error


def _near(path: Path) -> str:
    """Return a question, with a space before it, that names what is beside `path` under a similar name."""
    try:
        return did_you_mean(path.name, [beside.name for beside in path.parent.iterdir()])
    except OSError:
        # There is no such folder, or it cannot be read.
        return ""


def offline_variable() -> str:
    """Return the name of the environment variable that sets the offline mode."""
    return next((name for name in VARIABLES if os.environ.get(name)), VARIABLES[0])
