"""Calibration on rows with images, for multimodal models: every row is a window, as the model's processor makes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from ..architectures import get_architecture
from ..request.config import PruningConfig
from ..runs.loggers import get_logger
from ..runs.progress import progress
from .calibration import Calibration
from .tables import drawn


logger = get_logger(__name__)

# Columns of a row with images, and columns that a processor makes of them.
IMAGES = ("images", "image")
PROCESSED = "pixel_values"

# The tensors of one window, with a first axis that batches are joined along.
Window = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ImageRows:
    """Rows with images, and the processor of the model that reads them.

    Args:
        dataset: rows in a list or a `datasets.Dataset`. A row has `text` or `messages`, with `image` or `images` or
            with the images inside its messages; or the tensors that the processor made of one text and its images.
        processor (`ProcessorMixin`, *optional*): the processor, which rows without tensors need.
    """

    dataset: Any
    processor: ProcessorMixin | None

    def calibration(self, config: PruningConfig, model: PreTrainedModel) -> Calibration:
        """Return the windows. Statistics count the positions of images like those of text.

        Rows are not joined and not cut. Of more than `n_samples` rows, `n_samples` are drawn at random by the seed;
        rows of more than `seq_len` tokens are left out with a warning.

        Args:
            config (`PruningConfig`): the request.
            model (`PreTrainedModel`): the multimodal model.

        Raises:
            ValueError: where the model adds features of images between its layers, a row cannot be read, or none is
                short enough.
        """
        if get_architecture(model.config).layout.first_layers(model.config):
            raise ValueError(
                f"{model.config.model_type} adds features of images to the residual stream between its layers, which "
                f"calibration layer by layer cannot follow. Calibrate it on text."
            )
        rows = _rows(self.dataset)
        chosen = drawn(len(rows), config).tolist() if len(rows) > config.num_windows else list(range(len(rows)))
        windows, longest = [], 0
        for number in progress(chosen, "Reading images", unit="row"):
            window = _window(rows[number], number, self.processor, model)
            tokens = window["input_ids"].shape[1]
            longest = max(longest, tokens)
            if tokens <= config.seq_len:
                windows.append(window)
        if len(windows) < len(chosen):
            message = (
                f"{len(chosen) - len(windows)} of {len(chosen)} rows with images have more than seq_len="
                f"{config.seq_len} tokens; the longest has {longest}, images included."
            )
            if not windows:
                raise ValueError(f"{message} Raise seq_len to at least the length of the rows.")
            logger.warning("%s They are left out; raise seq_len to use them.", message)
        return _padded(windows)


def with_processor(dataset: Any, model: PreTrainedModel, processor: ProcessorMixin | None) -> Any:
    """Return a dataset of rows with images for a multimodal model as `ImageRows`, and any other data unchanged.

    Args:
        dataset: what a user passed.
        model (`PreTrainedModel`): the model.
        processor (`ProcessorMixin`, *optional*): its processor.
    """
    rows = None if model.config.get_text_config() is model.config else _rows(dataset)
    has_images = rows is not None and len(rows) > 0 and isinstance(rows[0], Mapping) and _has_image(rows[0])
    return ImageRows(dataset, processor) if has_images else dataset


def _rows(dataset: Any) -> Any:
    """Return a dataset whose rows have numbers; `None` for other data, such as text and generators."""
    if isinstance(dataset, Mapping):
        return [dataset] if PROCESSED in dataset else None
    has_numbers = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return dataset if has_numbers and not isinstance(dataset, (str, torch.Tensor, np.ndarray)) else None


def _has_image(row: Mapping) -> bool:
    if any(row.get(name) is not None for name in (PROCESSED, *IMAGES)):
        return True
    return any(_parts_with_images(row))


def _parts_with_images(row: Mapping) -> list[Any]:
    """Return the parts of messages that are images."""
    messages = row.get("messages") or ()
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, Sequence) for part in content]
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") == "image"]


def _window(row: Any, number: int, processor: ProcessorMixin | None, model: PreTrainedModel) -> Window:
    """Return the tensors of a row, each with a first axis that batches are joined along."""
    if not isinstance(row, Mapping):
        raise ValueError(f"Row {number} is a {type(row).__name__}, and rows with images are mappings.")
    # A dataset that a processor was mapped over may still have its other columns, such as the text.
    is_made = row.get("input_ids") is not None
    made = _inputs_among(row, model) if is_made else _processed(row, number, processor)
    try:
        tensors = {name: torch.as_tensor(values) for name, values in made.items() if values is not None}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Row {number} has values that are no tensors: {error}. Pass what the processor returned for the row."
        ) from error
    input_ids = tensors["input_ids"]
    if input_ids.dim() == 1:
        # A row of a dataset that a processor was mapped over has no axis of rows.
        tensors = {name: _with_axis(name, values, len(input_ids)) for name, values in tensors.items()}
    elif len(input_ids) != 1:
        raise ValueError(
            f"Row {number} is a batch of {len(input_ids)} texts, whose images cannot be told apart. Call the "
            f"processor for every row, and pass a list of what it returns."
        )
    tensors.pop("labels", None)
    return tensors


def _inputs_among(row: Mapping, model: PreTrainedModel) -> dict[str, Any]:
    """Return the columns of a row that are inputs of the model."""
    known = inspect.signature(type(model.base_model).forward).parameters
    return {name: values for name, values in row.items() if name in known}


def _with_axis(name: str, values: torch.Tensor, tokens: int) -> torch.Tensor:
    of_tokens = values.dim() == 1 and len(values) == tokens
    one_image = name == PROCESSED and values.dim() == 3
    return values[None] if of_tokens or one_image or (name == "image_grid_thw" and values.dim() == 1) else values


def _processed(row: Mapping, number: int, processor: Any) -> Mapping:
    """Return what the processor makes of a row."""
    if processor is None:
        raise ValueError(
            "Calibrating on images needs the processor of the model: FwdPruner(model, processor), or a folder that "
            "has one."
        )
    images = next((row[name] for name in IMAGES if row.get(name) is not None), None)
    images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    try:
        if row.get("messages") and not images:
            options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
            return processor.apply_chat_template(row["messages"], **options)
        text = row.get("text")
        if row.get("messages"):
            text = processor.apply_chat_template(row["messages"], tokenize=False)
        if not isinstance(text, str):
            raise ValueError(f"it has the columns {', '.join(map(str, row))}, and neither text nor messages")
        return processor(text=[text], return_tensors="pt", **({"images": [images]} if images else {}))
    except Exception as error:  # Processors raise errors of many types.
        raise ValueError(
            f"The {type(processor).__name__} cannot read row {number}: {type(error).__name__}: {error}. A row has "
            f"text or messages, with as many places for images as it has images."
        ) from error


def _padded(windows: list[Window]) -> Calibration:
    """Return windows as a calibration; tokens, and all values that there are one of per token, are padded."""
    length = max(window["input_ids"].shape[1] for window in windows)
    masks, padded = [], []
    for window in windows:
        shape = window["input_ids"].shape
        mask = window.pop("attention_mask", torch.ones(shape, dtype=torch.int64))
        short = length - shape[1]
        masks.append(F.pad(mask, (0, short)))
        padded.append(
            {name: F.pad(values, (0, short)) if values.shape == shape else values for name, values in window.items()}
        )
    input_ids = torch.cat([window.pop("input_ids") for window in padded])
    mask = torch.cat(masks)
    return Calibration(input_ids, None if mask.all() else mask, "rows", tuple(padded))
