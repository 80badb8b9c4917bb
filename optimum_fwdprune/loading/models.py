"""Loading models from a folder or from the Hub, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from ..architectures import get_architecture, is_pruned, is_supported
from .configs import FOLDER_OTHERWISE, no_model, read_config
from .integrity import check_checkpoint
from .offline import naming_offline
from .recorded import was_pruned


# Arguments of `from_pretrained` that determine where files are read from.
WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only")

# Arguments of `from_pretrained` that apply to other repositories of the same user too.
ACCESS = ("token", "cache_dir", "local_files_only", "trust_remote_code")


def auto_class_of(model_id: str | Path, config: PreTrainedConfig, where: Mapping[str, Any]) -> Any:
    """Return the Auto class of the task that a checkpoint was saved for.

    A dense model without a head is loaded as a language model, which needs no head if embeddings are tied.

    Args:
        model_id (`str` or `Path`): folder or repository.
        config (`PreTrainedConfig`): its config.
        where (mapping): `revision`, `token`, `cache_dir`, `subfolder` and the like.
    """
    pruned_class = _pruned_class_of(config)
    if pruned_class is None:
        return language_model_class(config)
    if pruned_class._auto_class == AutoModel.__name__ and not was_pruned(model_id, config, where):
        return language_model_class(config)
    return getattr(transformers, str(pruned_class._auto_class))


def language_model_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that loads a model of a supported family as one that predicts text:
    `AutoModelForCausalLM`, or that of multimodal models where the family has no other."""
    names = [name for candidate in get_architecture(config).model_classes for name in candidate.auto_classes]
    if "AutoModelForCausalLM" not in names and "AutoModelForImageTextToText" in names:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _pruned_class_of(config: PreTrainedConfig) -> Any:
    """Return the pruned class of the task that a checkpoint was saved for, dense or pruned; `None` where its config
    names no class of the family."""
    pruned = is_pruned(config)
    for candidate in get_architecture(config).model_classes:
        known = candidate if pruned else candidate.__bases__[-1]
        if known.__name__ in (config.architectures or [])[:1]:
            return candidate
    return None


def check_is_model(model_id: Any, where: Mapping[str, Any]) -> None:
    """Raise `ValueError` where `model_id` does not name a model: an object in memory, or adapters without their base.

    Args:
        model_id (`str` or `Path`): the argument that a user passed.
        where (mapping): `revision`, `token`, `cache_dir`, `subfolder` and the like.
    """
    if not isinstance(model_id, (str, Path)):
        raise ValueError(
            f"from_pretrained takes a folder or a repository of the Hub; got a {type(model_id).__name__}. "
            f"FwdPruner(model, tokenizer) takes a model in memory."
        )
    values = adapter_config(model_id, where)
    if values is None:
        return
    base = values.get("base_model_name_or_path")
    raise ValueError(
        f"{model_id} holds adapters{f' of {base}' if base else ''}, and a model without adapters is needed. Merge the "
        f"adapters into their base first: model = AutoPeftModelForCausalLM.from_pretrained({str(model_id)!r})"
        f".merge_and_unload(); then FwdPruner(model, tokenizer), or model.save_pretrained(folder) for the commands."
    )


def adapter_config(model_id: str | Path, where: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the adapters that a folder or repository holds, or `None` where it holds none.

    Args:
        model_id (`str` or `Path`): folder or repository.
        where (mapping): `revision`, `token`, `cache_dir`, `subfolder` and the like.

    Raises:
        ValueError: where the config is damaged; the message names its file.
    """
    file = find_adapter_config_file(str(model_id), **where)
    if file is None:
        return None
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    return values if isinstance(values, dict) else {}


def check_is_there(model_id: str | Path, **kwargs: Any) -> None:
    """Raise `OSError` or `ValueError` where a folder or repository has no config of a model; the message names it."""
    try:
        read_config(model_id, **kwargs)
    except OSError as error:
        raise OSError(f"Cannot load {model_id}: {error}") from error
    except ValueError as error:
        raise ValueError(f"Cannot load {model_id}: {error}") from error


def check_dtype(dtype: Any) -> None:
    """Raise `ValueError` where `dtype` is a string that names no dtype."""
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no dtype; use auto, float32, bfloat16 or float16.")


def build_without_weights(model_id: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Return a model of any family on the meta device, built from its config; where its class cannot be built there,
    the model is loaded.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        kwargs: for `from_pretrained`, such as `revision`, `token` and `trust_remote_code`.
    """
    config = read_config(model_id, **kwargs)
    with naming_offline(model_id, FOLDER_OTHERWISE):
        auto_class: Any = AutoModelForCausalLM
        if is_supported(config):
            auto_class = auto_class_of(model_id, config, {name: kwargs[name] for name in WHERE if name in kwargs})
        elif type(config) not in auto_class._model_mapping:
            # Remote code names its own classes, and neither mapping has its config.
            is_multimodal = type(config) in AutoModelForImageTextToText._model_mapping
            auto_class = AutoModelForImageTextToText if is_multimodal else auto_class
        try:
            with torch.device("meta"):
                return auto_class.from_config(config, trust_remote_code=kwargs.get("trust_remote_code"))
        except (NotImplementedError, RuntimeError) as error:
            try:
                return auto_class.from_pretrained(model_id, **kwargs)
            except OSError:
                # Without weights, the first error tells more.
                raise no_model(model_id, error) from error
        except Exception as error:
            raise no_model(model_id, error) from error


def load_without_weights(model_id: str | Path, config: PreTrainedConfig, auto_class: Any, **kwargs: Any) -> Any:
    """Return a model of a supported family on the meta device, built from its config, in the dtype that it would be
    loaded in. Of weights in a folder the headers are read and checked, and nothing is downloaded.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        config (`PreTrainedConfig`): its config.
        auto_class (`type`): Auto class of the task.
        kwargs: arguments of `from_pretrained`, of which `dtype`, `attn_implementation` and `trust_remote_code` count.

    Raises:
        OSError: where a file is damaged; the message names the file.
        ValueError: where config and weights contradict each other, or the config describes no model.
    """
    check_dtype(dtype := kwargs.get("dtype"))
    if Path(model_id).is_dir() and not kwargs.get("trust_remote_code"):
        check_checkpoint(model_id, config, {name: kwargs[name] for name in WHERE if name in kwargs}, auto_class)
    if dtype in (None, "auto"):
        dtype = config.dtype or config.get_text_config().dtype or torch.float32
    options = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if kwargs.get(name)}
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=dtype, **options).eval()
    except (NotImplementedError, RuntimeError) as error:
        raise no_model(model_id, error) from error


def load_causal_lm(model_id: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model, dense or pruned, or a multimodal model that predicts text (see
    [`load_for_task`])."""
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    auto_class: Any = AutoModelForCausalLM
    if "gguf_file" not in kwargs and find_adapter_config_file(str(model_id), **where) is None:
        config = read_config(model_id, **where, trust_remote_code=kwargs.get("trust_remote_code", False))
        if is_supported(config):
            auto_class = language_model_class(config)
    return load_for_task(model_id, auto_class, **kwargs)


def load_for_task(model_id: str | Path, auto_class: Any, **kwargs: Any) -> PreTrainedModel:
    """Load a model, dense or pruned.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        auto_class (`type`): Auto class of the task, such as `AutoModelForCausalLM`.
        kwargs: arguments of `from_pretrained`.

    Raises:
        OSError: where a file is missing or damaged; the message names the file.
        ValueError: where config and weights contradict each other, or the model is a pruned one of another task.
    """
    check_dtype(kwargs.get("dtype"))
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    # The check needs a config.json whose meaning is known. The config of remote code may mean anything, a GGUF file
    # contains its own config, and adapters only name their base.
    unchecked = "gguf_file" in kwargs or kwargs.get("trust_remote_code")
    if not unchecked and find_adapter_config_file(str(model_id), **where) is None:
        config = read_config(model_id, **where)
        pruned_class = _pruned_class_of(config) if is_pruned(config) else None
        if pruned_class is not None and auto_class.__name__ not in pruned_class.auto_classes:
            raise ValueError(
                f"{model_id} is a {pruned_class.__name__}, which {auto_class.__name__} cannot load; use "
                f"{pruned_class._auto_class}."
            )
        check_checkpoint(model_id, config, where, auto_class)
    if "gguf_file" in kwargs and (gguf_config := getattr(transformers, "GgufConfig", None)) is not None:
        # Quantized weights can be neither cut nor measured column by column.
        kwargs.setdefault("quantization_config", gguf_config(dequantize=True))
    with naming_offline(model_id, FOLDER_OTHERWISE):
        return auto_class.from_pretrained(model_id, **kwargs)
