"""Whether a checkpoint is that of a pruned model, which may have a stock class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..architectures import is_pruned
from ..request.files import CONFIG_NAME


def was_pruned(model_id: str | Path, config: PreTrainedConfig, where: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is that of a pruned model, by its config or, where its class is a stock class, by
    the file of the request beside its weights.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        config (`PreTrainedConfig`): its config.
        where (mapping): `revision`, `token`, `cache_dir`, `subfolder` and the like.
    """
    if is_pruned(config):
        return True
    # A dense model may be in the cache alone, where it is not known which files its repository lacks.
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(str(model_id), CONFIG_NAME, **missing, **where) is not None
