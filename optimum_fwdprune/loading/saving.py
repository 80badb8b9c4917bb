"""Writing the parts of a checkpoint, and checks, made before the work, that they can be written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..architectures import get_architecture, is_pruned
from ..architectures.sizes import ModelSizes
from ..architectures.wrapping import plain_model
from ..files import (
    DiskFullError,
    naming_what_is_full,
    save_weights_atomically,
    write_text_atomically,
)
from ..runs.loggers import get_logger
from ..words import public_name
from .offloading import file_of, read_parameter


logger = get_logger(__name__)

# Values of a generation config that transformers does not write to its file.
NOT_WRITTEN = ["compile_config"]


def check_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise `ValueError` where `save_pretrained` would fail on a config, a generation config or a tokenizer.

    All but the weights is written to a temporary folder, which takes a fraction of a second.

    Args:
        model (`PreTrainedModel`): the model, dense or pruned.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the tokenizer that is saved with it.
    """
    _check_generation_config(model)
    with tempfile.TemporaryDirectory(prefix="fwdprune-") as folder:
        try:
            with naming_what_is_full(Path(folder)):
                _write_all_but_weights(model, tokenizer, folder)
        except DiskFullError as error:
            # The checkpoint may be saved to another disk.
            logger.info("It was not checked whether the config and the tokenizer can be saved: %s", error)


def _write_all_but_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str) -> None:
    try:
        model.config.save_pretrained(folder)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The model's config cannot be saved ({' '.join(str(error).split())}). Correct model.config first."
        ) from error
    if tokenizer is None:
        return
    try:
        with naming_what_is_full(Path(folder)):
            tokenizer.save_pretrained(folder)
    except DiskFullError:
        raise
    except Exception as error:  # The code of a tokenizer may raise any error.
        raise ValueError(
            f"The tokenizer, a {type(tokenizer).__name__}, cannot be saved ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Use another tokenizer, or none: FwdPruner(model, tokenizer=None)."
        ) from error


def save_offloaded(
    model: PreTrainedModel, folder: Path, files: Path | None = None, written_as: PreTrainedModel | None = None
) -> None:
    """Write a model whose decoder layers are offloaded, one layer in memory at a time.

    The current weights are written, also where they were changed since the model was loaded.

    Args:
        model (`PreTrainedModel`): a model that accelerate has offloaded in any way.
        folder (`Path`): folder to write.
        files (`Path`, *optional*): folder of weight files that layers may be offloaded to. A file whose weights are
            all still offloaded is linked, or copied if it is on another disk.
        written_as (`PreTrainedModel`, *optional*): a model of another class without weights, whose parameters have the
            same names; the checkpoint is written as one of this class.
    """
    written_as = written_as or model
    with generation_config_as_it_is(written_as, folder):
        # An empty state has no weights, so that everything else is written.
        written_as.save_pretrained(folder, state_dict={})
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    prefixes = [f"{name}." for name, _ in get_architecture(model.config).layers(model)]
    parts = [[name for name in state if not name.startswith(tuple(prefixes))]]
    parts += [[name for name in state if name.startswith(prefix)] for prefix in prefixes]
    weight_map: dict[str, str] = {}
    # Stock checkpoints of mixtures hold one tensor per expert.
    like = _per_expert(written_as) if get_architecture(model.config).stores_experts_apart else None
    for number, part in enumerate(parts, 1):
        file = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: state[name] for name in part}
        if like is not None:
            values = {name: _value(model, name, tensor) for name, tensor in tensors.items()}
            stored = revert_weight_conversion(like, values)
            save_weights_atomically(file, {name: tensor.contiguous() for name, tensor in stored.items()})
            weight_map |= dict.fromkeys(stored, file.name)
            continue
        source = _unchanged_file(model, tensors, files)
        if source is None:
            save_weights_atomically(file, {name: _value(model, name, tensor) for name, tensor in tensors.items()})
        else:
            try:
                os.link(source, file)
            except OSError:
                shutil.copy2(source, file)
        weight_map |= dict.fromkeys(part, file.name)
    metadata = {
        "total_parameters": ModelSizes.of(model).parameters,
        "total_size": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    write_text_atomically(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _per_expert(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a model without weights of the class and config of a mixture, by which transformers converts weights to
    the form of stock checkpoints; `None` for a pruned class, whose checkpoints hold the tensors of the model."""
    if is_pruned(model.config):
        return None
    # A model that was loaded would be converted back to the form of the files that it was loaded from.
    with torch.device("meta"):
        return type(model)(model.config)


def _unchanged_file(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], files: Path | None) -> Path | None:
    """Return the file in `files` that holds exactly these weights in their current state, if there is one."""
    if files is None or not all(tensor.is_meta for tensor in tensors.values()):
        return None
    sources = {file_of(model, name) for name in tensors}
    source = sources.pop() if len(sources) == 1 else None
    if source is None or source.parent.resolve() != files.resolve():
        return None
    with safe_open(source, framework="pt") as content:
        # Dtypes are compared without reading values; the model's dtype may have been changed.
        dtypes = {name: content.get_slice(name)[:0].dtype for name in content.keys()}  # noqa: SIM118
    return source if dtypes == {name: tensor.dtype for name, tensor in tensors.items()} else None


def _value(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return read_parameter(model, name).to(tensor.dtype) if tensor.is_meta else tensor


@contextmanager
def generation_config_as_it_is(model: Any, folder: str | Path) -> Iterator[None]:
    """Write the model's generation config unchanged to the folder that the block saves the model in.

    Many published generation configs set a `temperature` without `do_sample`. Transformers loads them, but refuses to
    save them once any value was changed.

    Args:
        model (`PreTrainedModel`): the model; its generation config is replaced by a valid one during the block.
        folder (`str` or `Path`): folder that the block saves the model in.

    Raises:
        ValueError: where the config could not be loaded again.
    """
    _check_generation_config(model)
    kept: GenerationConfig | None = getattr(model, "generation_config", None)
    if kept is None or _is_valid(kept):
        yield
        return
    model.generation_config = type(kept)()
    try:
        yield
    finally:
        model.generation_config = kept
    if (file := Path(folder) / GENERATION_CONFIG_NAME).exists():
        kept.to_json_file(file, use_diff=True, keys_to_pop=NOT_WRITTEN)


@contextmanager
def naming_base(model: Any, base: str, pushed: bool) -> Iterator[None]:
    """Name the base of the adapters that the block saves, in their config and in the card that PEFT writes.

    PEFT takes the name in the card from the base model, whose own name is that of the model it was pruned from.

    Args:
        model (`PeftModel`): the model with adapters. Its base's names are restored afterwards, the adapters' configs
            keep the new name.
        base (`str`): folder or repository of the pruned model.
        pushed (`bool`): whether the adapters are uploaded to the Hub, where a local path would be useless.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = public_name(base) if pushed else base
    plain = plain_model(model)
    before = plain.name_or_path, plain.config._name_or_path
    plain.name_or_path = plain.config._name_or_path = public_name(base)
    try:
        yield
    finally:
        plain.name_or_path, plain.config._name_or_path = before


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _check_generation_config(model: PreTrainedModel) -> None:
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None:
        return
    if not isinstance(config, GenerationConfig):
        raise ValueError(
            f"model.generation_config is a {type(config).__name__}, which cannot be saved; it must be a "
            f"transformers.GenerationConfig."
        )
    try:
        _try_to_save(config)
    except Exception as error:  # Transformers raises various errors on values of wrong types.
        raise ValueError(
            f"The model's generation config could not be loaded again ({_with_value(error, config)}). Correct "
            f"model.generation_config first."
        ) from error


def _try_to_save(config: GenerationConfig) -> None:
    config.validate()
    config.to_json_string(keys_to_pop=NOT_WRITTEN)


def _with_value(error: Exception, config: GenerationConfig) -> str:
    """Return the message of an error, and the value that causes it, which errors about types do not name."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return message
    for name, value in vars(config).items():
        alone = GenerationConfig()
        setattr(alone, name, value)
        try:
            _try_to_save(alone)
        except Exception:
            return f"{name}={value!r}: {message}"
    return message
