"""Windows of tokens from texts that are joined end to end."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from ..loading.tokenizers import starting_tokens
from ..runs.loggers import get_logger
from .rows import Data
from .tables import drawn, pool_of
from .texts import detokenize


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..request.config import PruningConfig


logger = get_logger(__name__)

# Largest number of characters that are tokenized at once.
PIECE = 1_000_000

# Few tokens of any tokenizer are longer on average, so that a piece of this many characters per token is large enough.
CHARACTERS_PER_TOKEN = 8


def windows_of_text(
    pieces: Iterable[list[int]],
    config: PruningConfig,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    takes_less: bool = False,
) -> torch.Tensor:
    """Draw `n_samples` different windows of `seq_len` tokens at random by the seed, from pieces joined end to end.

    Args:
        pieces (iterable of `list[int]`): the tokens.
        config (`PruningConfig`): the request.
        data (`Data`): the rows that the pieces are made of.
        tokenizer (`PreTrainedTokenizerBase`): writes the tokens that every window starts with.
        takes_less (`bool`, defaults to `False`): whether fewer windows are used where there are no more.

    Raises:
        ValueError: where there are too few tokens.
    """
    start = starting_tokens(tokenizer, config.seq_len)
    length = config.seq_len - len(start)
    # An array takes four bytes per token, a list nine times as much.
    pool, most = array("i"), pool_of(config)
    for piece in pieces:
        pool.extend(piece)
        if len(pool) >= most * length:
            break
    data.report()
    available = len(pool) // length
    if 0 < available < config.num_windows and takes_less:
        logger.warning(
            "%s has %d windows of %d tokens, and the default number for this model is %d; all of them are used. Name "
            "more text, or set n_samples.",
            data.name,
            available,
            config.seq_len,
            config.num_windows,
        )
    elif available < config.num_windows:
        raise ValueError(
            f"{data.name} is too short: it has {available} windows of {config.seq_len} tokens, and n_samples is "
            f"{config.num_windows}. Lower n_samples or seq_len, or calibrate on more text."
        )
    count = min(available, most)
    windows = torch.frombuffer(pool, dtype=torch.int32, count=count * length).view(count, length)
    windows = windows[drawn(len(windows), config)].long()
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(windows), -1), windows], dim=1)


def tokenized_at_once(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> Iterator[list[int]]:
    """Yield tokens of texts that are joined to large pieces; a call per line would take longer than forward passes.

    Pieces are not much larger than `wanted` tokens require, so that a stream is read no further than needed.
    """
    pending, pending_length = [], 0
    for text in texts:
        pending.append(text)
        pending_length += len(text)
        if pending_length > min(PIECE, CHARACTERS_PER_TOKEN * wanted):
            tokens = tokenized(detokenize("".join(pending)), tokenizer)
            wanted = max(1, wanted - len(tokens))
            yield tokens
            pending, pending_length = [], 0
    if pending:
        yield tokenized(detokenize("".join(pending)), tokenizer)


def tokenized(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: the tokenizer would warn of texts longer than the model's context, which are allowed here.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
