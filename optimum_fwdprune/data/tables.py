"""Windows of token ids, from tables and from rows of any lengths, without a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..runs.loggers import get_logger
from .calibration import Calibration
from .messages import UnusableRow
from .rows import Data
from .tokens import Tokens, check_only_text


if TYPE_CHECKING:
    from ..request.config import PruningConfig


logger = get_logger(__name__)

# Windows are drawn from up to this many times the requested number, so that a stream is not read to its end.
POOL_FACTOR = 8

# Largest number of tokens, in addition to those of `n_samples` windows, that windows are drawn from.
MAX_SURPLUS = 2**24


def table_of(dataset: Any) -> Calibration | None:
    """Return token ids that are a table or a single row as a calibration; `None` for other data."""
    mask = None
    if isinstance(dataset, Mapping) and "input_ids" in dataset:
        check_only_text(dataset)
        dataset, mask = dataset["input_ids"], dataset.get("attention_mask")
    elif not isinstance(dataset, torch.Tensor) and not isinstance(dataset, np.ndarray):
        return None
    input_ids, hidden = _as_table(dataset), None if mask is None else _as_table(mask)
    if input_ids is None or (hidden is None) != (mask is None):
        return None
    return Calibration(input_ids, hidden)


def _as_table(values: Any) -> torch.Tensor | None:
    """Return a tensor, an array, or a list of rows of one length as a table; a single row becomes a table of one."""
    if isinstance(values, np.ndarray):
        # It is copied, since PyTorch does not support negative strides and other byte orders.
        values = values.astype(values.dtype.newbyteorder("="), order="C")
    elif isinstance(values, str) or not isinstance(values, (torch.Tensor, Sequence)):
        return None
    elif not isinstance(values, torch.Tensor):
        values = [row.tolist() if hasattr(row, "tolist") else row for row in values]
    try:
        table = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError):
        # The rows have different lengths, or hold no numbers.
        return None
    if isinstance(values, list) and table.dim() > 2:
        # A list of batches is not a table.
        return None
    return table[None] if table.dim() == 1 else table


def windows_of_table(table: Calibration, config: PruningConfig) -> Calibration:
    """Return the windows of a table, which are its rows unless they are too long or too many."""
    input_ids, mask = table.input_ids, table.attention_mask
    if longest(table) > config.seq_len:
        masks: Any = [None] * len(input_ids) if mask is None else mask
        rows = ({"input_ids": ids, "attention_mask": present} for ids, present in zip(input_ids, masks))
        return windows_of_rows(Data(table.source, rows), config)
    if len(input_ids) <= config.num_windows:
        return table
    logger.warning(
        "The calibration data has %d windows, of which n_samples=%d are drawn; raise n_samples to use more.",
        len(input_ids),
        config.num_windows,
    )
    return table.part(drawn(len(input_ids), config).to(input_ids.device))


def windows_of_rows(data: Data, config: PruningConfig) -> Calibration:
    """Return the windows of rows of token ids: rows that are short enough, and full windows of longer ones."""
    shortened = False

    def windows_of(row: Tokens) -> list[torch.Tensor]:
        nonlocal shortened
        ids = row.without_padding().input_ids
        if len(ids) < 2:
            raise UnusableRow(f"it has {len(ids)} tokens that are no padding, and none to predict")
        if len(ids) <= config.seq_len:
            return [torch.from_numpy(ids)]
        shortened = True
        return list(torch.from_numpy(ids[: len(ids) // config.seq_len * config.seq_len]).split(config.seq_len))

    windows = list(islice(data.converted(windows_of), pool_of(config)))
    data.report()
    if shortened and len(windows) < config.num_windows:
        logger.warning(
            "%s has %d windows of up to %d tokens, and n_samples is %d; all of them are used.",
            data.name,
            len(windows),
            config.seq_len,
            config.num_windows,
        )
    if len(windows) > config.num_windows:
        windows = [windows[place] for place in drawn(len(windows), config)]
    input_ids = pad_sequence(windows, batch_first=True)
    lengths = torch.tensor([[len(window)] for window in windows])
    mask = torch.arange(input_ids.shape[1]) < lengths
    return Calibration(input_ids, None if mask.all() else mask.long(), data.name)


def pool_of(config: PruningConfig) -> int:
    """Return how many windows are read at most, of which `n_samples` are drawn."""
    count = config.num_windows
    return min(POOL_FACTOR * count, count + max(1, MAX_SURPLUS // config.seq_len))


def drawn(count: int, config: PruningConfig) -> torch.Tensor:
    """Return the numbers of `n_samples` of `count` windows, drawn at random by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))[: config.num_windows]


def longest(calibration: Calibration) -> int:
    """Return the number of tokens of the longest window, without padding."""
    mask = calibration.attention_mask
    return calibration.input_ids.shape[1] if mask is None else int(mask.bool().sum(1).max())
