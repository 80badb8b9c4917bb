"""A model with its tokenizer, opened from a folder or the Hub; whatever is wrong shows before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..runs.loggers import get_logger
from ..words import public_name
from .models import (
    ACCESS,
    FOLDER_OTHERWISE,
    WHERE,
    auto_class_of,
    check_is_model,
    check_unquantized,
    load_for_task,
)
from .offline import naming_offline
from .offloading import device_map_on_disk
from .placement import placed
from .source import Source
from .tokenizers import load_tokenizer, named_tokenizer


logger = get_logger(__name__)


def open_model(
    model_id: str | Path, tokenizer: Any, low_memory: bool, arguments: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, Source]:
    """Return a model for the task that it was saved for, its tokenizer where it has one, and its source.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        tokenizer (`PreTrainedTokenizerBase`, `str` or `Path`, *optional*): instead of the one beside the model.
        low_memory (`bool`): leave the decoder layers on disk.
        arguments (mapping): for the Auto class's `from_pretrained`.

    Raises:
        OSError: where a file is missing or damaged, naming it.
        ValueError: where the family is not supported, the folder holds adapters without their base, the arguments
            contradict each other, or the tokenizer cannot be read.
    """
    options = {"dtype": "auto", **arguments}
    check_is_model(model_id, {name: options[name] for name in WHERE if name in options})
    shared = {name: options[name] for name in (*WHERE, "trust_remote_code", "gguf_file") if name in options}
    auto_class: Any = AutoModelForCausalLM
    # Reading the config of a GGUF file costs as much as reading all of it.
    if "gguf_file" not in options:
        # A family that is not supported fails before gigabytes are read.
        with naming_offline(model_id, FOLDER_OTHERWISE):
            config = AutoConfig.from_pretrained(model_id, **shared)
        auto_class = auto_class_of(config)
        check_unquantized(model_id, config, options.get("quantization_config"))
    if low_memory:
        if "gguf_file" in options or "device_map" in options:
            raise ValueError(
                "low_memory=True reads the decoder layers from safetensors files, one by one; leave out gguf_file and "
                "device_map."
            )
        options["device_map"] = device_map_on_disk(config, auto_class)
    opened_tokenizer = _tokenizer(model_id, tokenizer, options, shared)
    model = load_for_task(model_id, auto_class, **placed(options))
    # A tokenizer that was passed in memory has no name.
    named = {"tokenizer": public_name(str(tokenizer))} if isinstance(tokenizer, (str, Path)) else {}
    return model, opened_tokenizer, Source.opened(model_id, {**options, **named}, low_memory)


def _tokenizer(
    model_id: str | Path, tokenizer: Any, options: Mapping[str, Any], shared: Mapping[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was named, or the one beside the model; a warning where there is none."""
    if tokenizer is not None:
        return named_tokenizer(tokenizer, **{name: options[name] for name in ACCESS if name in options})
    beside_the_model = load_tokenizer(model_id, **shared)
    if beside_the_model is None:
        logger.warning(
            "%s has no tokenizer; calibration can use token ids and the model's own text only. Name one with "
            "tokenizer=... (--tokenizer).",
            model_id,
        )
    return beside_the_model
