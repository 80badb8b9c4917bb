"""Opening a model with its tokenizer from a folder or the Hub; errors are raised before the weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..architectures import get_architecture
from ..files import naming_what_is_full
from ..runs.loggers import get_logger
from ..words import public_name
from .configs import read_config
from .models import (
    ACCESS,
    WHERE,
    auto_class_of,
    check_is_model,
    load_for_task,
    load_without_weights,
)
from .offloading import device_map_on_disk
from .placement import placed
from .quantized import dequantizing
from .source import Source
from .tokenizers import load_processor, load_tokenizer, named_tokenizer
from .workspace import Workspace


logger = get_logger(__name__)


def open_model(
    model_id: str | Path, tokenizer: Any, low_memory: bool, arguments: Mapping[str, Any], with_weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin | None, Source]:
    """Return a model for the task that it was saved for, its processor or tokenizer if it has one, and its source.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*): tokenizer that replaces the model's own.
        low_memory (`bool`): leave the decoder layers on disk.
        arguments (mapping): arguments of the Auto class's `from_pretrained`.
        with_weights (`bool`, defaults to `True`): whether the weights are read. Without them the model is on the meta
            device, except for GGUF files, whose config and weights are one file.

    Raises:
        OSError: where a file is missing or damaged; the message names the file.
        ValueError: where the family is not supported, the folder holds adapters without their base, the arguments
            contradict each other, or the tokenizer cannot be read.
    """
    options = {"dtype": "auto", **arguments}
    check_is_model(model_id, {name: options[name] for name in WHERE if name in options})
    shared = _shared(options)
    auto_class: Any = AutoModelForCausalLM
    # Reading the config of a GGUF file takes as long as reading the whole file.
    if "gguf_file" not in options:
        # An unsupported family is refused before gigabytes are read.
        config = read_config(model_id, **shared)
        auto_class = auto_class_of(model_id, config, {name: options[name] for name in WHERE if name in options})
        quantization_config = dequantizing(model_id, config, options.get("quantization_config"))
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
    if low_memory:
        if "gguf_file" in options or "device_map" in options:
            raise ValueError(
                "low_memory=True reads the decoder layers from safetensors files, one by one; leave out gguf_file and "
                "device_map."
            )
        if with_weights:
            options["device_map"] = device_map_on_disk(config, auto_class)
    opened_tokenizer: Any = _tokenizer(model_id, tokenizer, options, shared)
    if tokenizer is None and "gguf_file" not in options and config.get_text_config() is not config:
        opened_tokenizer = load_processor(model_id, **shared) or opened_tokenizer
    if with_weights or "gguf_file" in options:
        model = _loaded(model_id, auto_class, options, low_memory)
    else:
        model = load_without_weights(model_id, config, auto_class, **options)
    # A tokenizer that was passed in memory has no name.
    tokenizer_name = {"tokenizer": public_name(str(tokenizer))} if isinstance(tokenizer, (str, Path)) else {}
    return model, opened_tokenizer, Source.opened(model_id, {**options, **tokenizer_name}, low_memory)


def _loaded(model_id: str | Path, auto_class: Any, options: Mapping[str, Any], low_memory: bool) -> PreTrainedModel:
    """Load a model, dequantized if its checkpoint is quantized.

    The files of a mixture of experts hold one tensor per expert, and its class has one for all, and those of a
    quantized model hold other weights than its class. With `low_memory` a copy of the weights is written then that
    layers are read from. It is removed with the model.
    """
    differs = low_memory and (
        options.get("quantization_config") is not None
        or get_architecture(read_config(model_id, **_shared(options))).stores_experts_apart
    )
    if not differs:
        return load_for_task(model_id, auto_class, **placed(options))
    workspace = Workspace(options.get("offload_folder"))
    with naming_what_is_full(workspace.folder):
        model = load_for_task(model_id, auto_class, **{**options, "offload_folder": str(workspace.folder)})
    vars(model)["_converted"] = workspace
    return model


def _shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that configs and tokenizers are read with, too."""
    return {name: options[name] for name in (*WHERE, "trust_remote_code", "gguf_file") if name in options}


def _tokenizer(
    model_id: str | Path, tokenizer: Any, options: Mapping[str, Any], shared: Mapping[str, Any]
) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    """Return the tokenizer that the user named, or the model's own; warn where there is none."""
    if isinstance(tokenizer, ProcessorMixin):
        return tokenizer
    if tokenizer is not None:
        return named_tokenizer(tokenizer, **{name: options[name] for name in ACCESS if name in options})
    own_tokenizer = load_tokenizer(model_id, **shared)
    if own_tokenizer is None:
        logger.warning(
            "%s has no tokenizer; calibration can only use token ids or text that the model generates. Name one with "
            "tokenizer=... (--tokenizer).",
            model_id,
        )
    return own_tokenizer
