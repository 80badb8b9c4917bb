"""Models from a folder or from the Hub, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .architectures import get_architecture, is_pruned
from .integrity import check_checkpoint


# Of `from_pretrained`: where files are looked for.
WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only")

# And what holds for other repositories of the same user.
ACCESS = ("token", "cache_dir", "local_files_only", "trust_remote_code")


def auto_class_of(config: PreTrainedConfig) -> Any:
    """Return the Auto class of the task that a checkpoint was saved for.

    A dense bare model counts as a causal language model: where embeddings are tied nothing is missing.
    """
    pruned = is_pruned(config)
    for candidate in get_architecture(config).model_classes:
        known = candidate if pruned else candidate.__bases__[-1]
        found = getattr(transformers, str(candidate._auto_class))
        if known.__name__ in (config.architectures or [])[:1] and (pruned or found is not AutoModel):
            return found
    return AutoModelForCausalLM


def load_causal_lm(model_id: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model, dense or pruned (see [`load_for_task`])."""
    return load_for_task(model_id, AutoModelForCausalLM, **kwargs)


def load_for_task(model_id: str | Path, auto_class: Any, **kwargs: Any) -> PreTrainedModel:
    """Load a model, dense or pruned.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        auto_class (`type`): of the task, such as `AutoModelForCausalLM`.
        kwargs: for `from_pretrained`.

    Raises:
        OSError: where a file is not there or, naming it, is damaged; nothing is loaded then.
        ValueError: where its config and its weights contradict each other, or a pruned model has another task.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    # Code of the repository may describe anything, a GGUF file describes itself, and adapters name their base.
    unchecked = "gguf_file" in kwargs or kwargs.get("trust_remote_code")
    if not unchecked and find_adapter_config_file(str(model_id), **where) is None:
        config = AutoConfig.from_pretrained(model_id, **where)
        if is_pruned(config) and (own := auto_class_of(config)) is not auto_class:
            raise ValueError(
                f"{model_id} is a {config.architectures[0]}, and {auto_class.__name__} would load something else; "
                f"{own.__name__} loads it."
            )
        check_checkpoint(model_id, config, where, auto_class)
    return auto_class.from_pretrained(model_id, **kwargs)
