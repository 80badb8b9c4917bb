"""Models from a folder or from the Hub, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .integrity import check_checkpoint


# Of `from_pretrained`: where files are looked for.
WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only")

# And what holds for other repositories of the same user.
ACCESS = ("token", "cache_dir", "local_files_only", "trust_remote_code")


def load_causal_lm(model_id: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model, dense or pruned.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        OSError: where a file is not there or, naming it, is damaged; nothing is loaded then.
        ValueError: where its config and its weights contradict each other.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    # Code of the repository may describe anything, a GGUF file describes itself, and adapters name their base.
    unchecked = "gguf_file" in kwargs or kwargs.get("trust_remote_code")
    if not unchecked and find_adapter_config_file(str(model_id), **where) is None:
        check_checkpoint(model_id, AutoConfig.from_pretrained(model_id, **where), where)
    return AutoModelForCausalLM.from_pretrained(model_id, **kwargs)
