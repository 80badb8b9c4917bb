"""Reading the config of a model from a folder or from the Hub, with errors that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

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
        except (OSError, ValueError) as error:
            missing = _without_config(model_id)
            if missing is None:
                raise
            raise missing from error
        except Exception as error:
            # Config classes check their values, and raise errors of many types. The cause has the plain sentence.
            raise no_model(model_id, error.__cause__ or error) from error


def _without_config(model_id: str | Path) -> OSError | None:
    """Return an error for a folder without a config, which names those inside of it that have one."""
    folder = Path(model_id)
    if not folder.is_dir() or any((folder / name).exists() for name in (CONFIG_NAME, "adapter_config.json")):
        return None
    inside = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f" Did you mean {' or '.join(inside[:3])}?" if inside else ""
    return OSError(f"{model_id} has no {CONFIG_NAME}, so that it holds no model.{hint}")


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
