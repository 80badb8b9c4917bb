"""Models from a folder or from the Hub, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file


# Of `from_pretrained`: where files are looked for.
WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


def load_causal_lm(model_id: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model, dense or pruned.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError: where a file is not there or, naming it, is damaged; nothing is loaded then.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(model_id, **kwargs)
    except SafetensorError as error:
        where = {name: kwargs[name] for name in WHERE if name in kwargs}
        config = cached_file(str(model_id), "config.json", **where)
        files = [] if config is None else sorted(Path(config).parent.glob("*.safetensors"))
        damaged = ", ".join(str(file) for file in files if not _opens(file)) or f"A file of {model_id}"
        raise OSError(f"{damaged} is damaged or incomplete ({error}). Copy or download it again.") from error


def _opens(file: Path) -> bool:
    """Whether a file's header is whole, and speaks of as many bytes as there are."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False
