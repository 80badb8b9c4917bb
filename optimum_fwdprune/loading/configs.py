"""Reading the config of a model from a folder or from the Hub, with errors that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .offline import naming_offline


# The way out, in errors, where a model cannot be downloaded in offline mode.
FOLDER_OTHERWISE = "name a folder that holds the model"


def read_config(model_id: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Return the config of a model.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        kwargs: for `AutoConfig.from_pretrained`, such as `revision`, `token` and `trust_remote_code`.

    Raises:
        OSError: where there is no such folder or repository, or it has no config.
        ValueError: where the config is not JSON, of an unknown type, or has values that no model can have.
    """
    with naming_offline(model_id, FOLDER_OTHERWISE):
        try:
            return AutoConfig.from_pretrained(model_id, **kwargs)
        except (OSError, ValueError):
            raise
        except Exception as error:
            # Config classes check their values, and raise errors of many types. The cause has the plain sentence.
            raise no_model(model_id, error.__cause__ or error) from error


def no_model(model_id: str | Path, error: BaseException) -> ValueError:
    """Return an error that says that the values of a config describe no model.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        error (`BaseException`): the error of reading the config, or of building the model.
    """
    reason = str(error).strip().removesuffix(".")
    plain = type(error) in (ValueError, TypeError, RuntimeError)
    return ValueError(
        f"config.json of {model_id} describes no model: {reason if plain else f'{type(error).__name__}: {reason}'}. "
        f"Correct this value, or copy or download the file again."
    )
