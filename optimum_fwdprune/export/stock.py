"""Stock export: a checkpoint that transformers loads without this package, of a model whose layers were cut alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..architectures import get_architecture, is_pruned
from ..architectures.stock_form import stock_form
from ..architectures.wrapping import check_in_memory, check_no_adapters
from ..cutting.verification import (
    logits,
    probe_batch,
    share_of_scale,
    tolerance_of,
)
from ..files import folder_moved_into_place
from ..loading.offloading import input_device, is_offloaded, on_disk
from ..loading.saving import generation_config_as_it_is, save_offloaded
from ..loading.state import check_not_consumed
from ..runs.progress import one_step


def export_stock(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
    folder: str | Path,
    overwrite: bool = False,
) -> Path:
    """Write a uniformly pruned model as a checkpoint of its stock family, or of a family that computes the same.

    A model that lost whole layers or experts alone has a stock class already, and is copied without its record.

    The folder appears whole or not at all, once the checkpoint was loaded again and its logits were compared. Layers
    that are offloaded are in memory one at a time.

    Args:
        model (`PreTrainedModel`): the pruned model, of any task class, whose layers were cut alike.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): written too, with its chat template.
        folder (`str` or `Path`): folder to write, new or empty.
        overwrite (`bool`, defaults to `False`): replace a folder that is not empty.

    Raises:
        ValueError: where no stock class can hold the model; the message names the reason.
        RuntimeError: where the logits of the stock model differ.
        FileExistsError: where the folder is not empty.
    """
    check_in_memory(model)
    check_not_consumed(model)
    check_no_adapters(model, "an export cannot hold")
    config, model_class = _stock_form(model)
    probe = probe_batch(model, None)
    with folder_moved_into_place(folder, overwrite) as temporary:
        _write(model, config, model_class, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        with one_step("Verifying the exported model"):
            device = input_device(model)
            # The memory may not hold a second model.
            device_map = on_disk(model, device) if is_offloaded(model) else {"": device}
            written = model_class.from_pretrained(temporary, dtype=model.dtype, device_map=device_map)
            difference = share_of_scale(logits(model, probe), logits(written, probe))
            del written
        # A difference of NaN must fail too.
        if not difference <= tolerance_of(model.dtype):
            raise RuntimeError(
                f"The logits of the stock {config.model_type} differ from those of the pruned model by "
                f"{difference:.2g} of their scale. Nothing was written; please report this as a bug."
            )
    return Path(folder)


def _stock_form(model: PreTrainedModel) -> tuple[PreTrainedConfig, Any]:
    """Return the stock config and class that hold the weights of a pruned model."""
    if not is_pruned(model.config) and getattr(model, "pruning_record", None) is not None:
        return copy.deepcopy(model.config), type(model)
    return stock_form(model.config, get_architecture(model.config).pruned_class(model))


def _write(model: PreTrainedModel, config: PreTrainedConfig, model_class: Any, folder: Path) -> None:
    """Write the weights of a pruned model as a checkpoint of a stock class."""
    offloaded = is_offloaded(model)
    if offloaded:
        with torch.device("meta"):
            stock = model_class(config)
        stock.config.dtype = model.dtype
    else:
        stock = model_class.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)
    if model.can_generate():
        stock.generation_config = model.generation_config
    if offloaded:
        save_offloaded(model, folder, written_as=stock)
    else:
        with generation_config_as_it_is(stock, folder):
            stock.save_pretrained(folder)
