"""Checks that the config and the weights of a checkpoint describe the same model, made before either is used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..architectures import is_pruned


Shapes = dict[str, tuple[int, ...]]


def check_checkpoint(
    model_id: str | Path, config: PreTrainedConfig, where: Mapping[str, Any], auto_class: Any
) -> None:
    """Compare a config with the headers of the safetensors files: names, shapes, and total size.

    A wrong config could describe a model that no memory holds, and parameters that are missing from the files would be
    initialized at random. Checkpoints without safetensors files and quantized ones are not checked.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub, whose files are downloaded into the cache.
        config (`PreTrainedConfig`): its config.
        where (mapping): `revision`, `token`, `cache_dir`, `subfolder` and the like.
        auto_class (`type`): Auto class of the task that it is loaded for.

    Raises:
        OSError: where a file is damaged or missing; the message names the file.
        ValueError: where config and weights contradict each other.
    """
    files = weight_files(model_id, where)
    if not files:
        return
    stored = shapes_of(files)
    described = _described_by(config, auto_class, len(stored), files[0].parent)
    if getattr(config, "quantization_config", None) is not None:
        return
    for name in sorted(described.keys() & stored.keys()):
        if described[name] != stored[name]:
            raise ValueError(
                f"{name} has the shape {list(stored[name])} in the weights of {model_id} and {list(described[name])} "
                f"by its config.json; one of the two was changed, or belongs to another model."
            )
    missing = sorted(described.keys() - stored.keys())
    if missing and is_pruned(config):
        raise ValueError(
            f"The weights of {model_id} lack {len(missing)} of the parameters that its config.json describes, such as "
            f"{missing[0]}; copy or download it again."
        )
    sizes = [sum(map(math.prod, shapes.values())) for shapes in (described, stored)]
    # A checkpoint may lack the head of a task: transformers initializes it at random, with a warning.
    if sizes[0] > 2 * sizes[1]:
        raise ValueError(
            f"The config.json of {model_id} describes {sizes[0]:,} parameters, and its weights have {sizes[1]:,}; one "
            f"of the two was changed, or belongs to another model."
        )


def weight_files(model_id: str | Path, where: Mapping[str, Any]) -> list[Path]:
    """Return the safetensors files of a folder, or of a repository, downloaded into the cache; none if it has none."""

    def find(name: str) -> str | None:
        return cached_file(str(model_id), name, _raise_exceptions_for_missing_entries=False, **where)

    whole = find(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [Path(whole)]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    try:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        outside = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of weight files: {type(error).__name__}: {error}.") from error
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}; weight files must be .safetensors files in the same folder.")
    shards, _ = get_checkpoint_shard_files(str(model_id), index, **where)
    return [Path(shard) for shard in shards]


def shapes_of(files: Iterable[Path]) -> Shapes:
    """Return names and shapes of the tensors in safetensors files, of which only the headers are read.

    Raises:
        OSError: where a file is damaged or missing; the message names the file.
    """
    shapes: Shapes = {}
    damaged = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing. Copy or download it again.") from error
        except SafetensorError as error:
            damaged.append(f"{path} is damaged or incomplete ({error})")
    if damaged:
        raise OSError(f"{', '.join(damaged)}. Copy or download it again.")
    return shapes


def _described_by(config: PreTrainedConfig, auto_class: Any, tensors: int, folder: Path) -> Shapes:
    """Return names and shapes of the parameters that a config describes; tied ones are returned once."""
    layers = config.get_text_config().num_hidden_layers
    # Building a layer takes time and memory even without weights.
    if not 0 <= layers <= tensors:
        raise ValueError(
            f"{folder / 'config.json'} describes {layers} layers, and the weights have {tensors} tensors in all."
        )
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except Exception as error:
        raise ValueError(f"{folder / 'config.json'} describes no model: {type(error).__name__}: {error}.") from error
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(value.shape) for name, value in model.named_parameters() if name not in tied}
