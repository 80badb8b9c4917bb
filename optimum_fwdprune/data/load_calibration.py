"""Calibration tokens from a dataset, a file, strings, token ids, or the model itself."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..loading.offline import offline_variable
from ..runs import ranks
from ..runs.loggers import get_logger
from ..runs.resume import Resume
from .calibration import Calibration, counted_targets
from .chats import chat_text, check_template
from .rows import CHAT, TOKENS, Data
from .sampling import sample_from_model
from .tables import POOL_FACTOR, drawn, longest, table_of, windows_of_rows, windows_of_table
from .texts import (
    PRESETS,
    SELF,
    always_text,
    detokenize,
    load_rows,
    open_rows,
    texts_of,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..request.config import PruningConfig


logger = get_logger(__name__)

# Windows are drawn from no more than so many tokens beyond those asked for.
MAX_SURPLUS = 2**24


def load_calibration(
    config: PruningConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any = None,
    resume: Resume | None = None,
) -> Calibration:
    """Turn whatever the user names into token windows.

    Text and chats are written end to end, the chats by the tokenizer's chat template, and cut into windows of
    `seq_len` tokens, of which `n_samples` are drawn at random by `seed`. Token ids keep their rows apart: a row of up
    to `seq_len` tokens is a window (padding is left out of account), a longer one is cut into as many whole windows as
    it holds, and where there are more than `n_samples` windows, so many are drawn.

    Args:
        config (`PruningConfig`): `calibration` names the source where `dataset` is not given; `n_samples`, `seq_len`,
            `seed` and the `dataset_*` fields say what to take.
        model (`PreTrainedModel`): the dense model; it writes the text itself for `"self"`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for every source but tokens and `"self"`.
        dataset (*optional*): a `str` (as `config.calibration`); text, chats or rows in lists, generators, datasets or
            pandas; or token ids: a tensor or array `[tokens]` or `[sequences, tokens]`, a tokenizer's batch with its
            `attention_mask`, rows with `input_ids`, lists of any lengths. A `Calibration` is taken as it is.
        resume (`Resume`, *optional*): where text that the model writes is kept.

    Raises:
        ValueError: on a source that is empty, too short or not understood, and on tokens that the model has no
            embedding for or that leave nothing to predict.
    """
    if isinstance(dataset, Calibration):
        calibration = dataset
    elif (table := table_of(dataset)) is not None:
        calibration = windows_of_table(table, config)
    else:
        calibration = _from_rows(config, model, tokenizer, dataset, resume)
    _check_tokens(calibration, model)
    return calibration


def _from_rows(
    config: PruningConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    resume: Resume | None,
) -> Calibration:
    source = config.calibration if dataset is None else dataset
    if source is None:
        source = ranks.from_main(_default_source)
    if isinstance(source, str) and source == SELF:
        _check_length(config.seq_len, model)
        return Calibration(sample_from_model(model, tokenizer, config, resume or Resume()), source=SELF)

    def needed_tokenizer() -> PreTrainedTokenizerBase:
        if tokenizer is None:
            name = repr(str(source)) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
            raise ValueError(
                f"Calibrating on {name} needs a tokenizer: FwdPruner(model, tokenizer). {SELF!r} does not."
            )
        # Before a dataset is read.
        _check_length(config.seq_len, model)
        return tokenizer

    if always_text(source):
        needed_tokenizer()
    name, rows = open_rows(source, config.dataset_config, config.dataset_split, config.seed)

    def read() -> torch.Tensor:
        data = Data(name, rows, config.dataset_column)
        if data.kind == TOKENS:
            taken = windows_of_rows(data, config)
            mask = torch.ones_like(taken.input_ids) if taken.attention_mask is None else taken.attention_mask
            return torch.stack([taken.input_ids, mask])
        writer = needed_tokenizer()
        if data.kind == CHAT:
            check_template(writer)
            pieces = data.converted(lambda chat: [_tokenized(chat_text(chat, writer), writer)])
        else:
            pieces = _tokenized_at_once(texts_of(data, source), writer)
        windows = _windows(pieces, config, data)
        return torch.stack([windows, torch.ones_like(windows)])

    # A text that is sampled or fetched twice may not be the same twice.
    input_ids, mask = ranks.tensor_from_main(read)
    return Calibration(input_ids, None if mask.all() else mask, source=name)


def _default_source() -> str:
    """WikiText-2 where the Hub answers, or offline its cache, else the model's own text."""
    from huggingface_hub import HfApi, is_offline_mode

    try:
        if not is_offline_mode():
            # One short question: loading a dataset would retry for half a minute where there is no network.
            HfApi().dataset_info(PRESETS["wikitext2"]["path"], timeout=5)
        next(iter(load_rows(**PRESETS["wikitext2"])))
        return "wikitext2"
    except Exception as error:  # Whatever fails on the way to the Hub, the answer is the same.
        if is_offline_mode():
            why = f"it is not in the cache, and {offline_variable()} is set, which forbids to download it"
            way_out = "unset that variable"
        else:
            why, way_out = type(error).__name__, "set HF_HUB_OFFLINE=1 where WikiText-2 is in the cache"
        logger.warning(
            "WikiText-2 is not at hand (%s), so calibration uses text sampled from the model itself. Name a text file "
            "with `calibration` to use that, or %s.",
            why,
            way_out,
        )
        return SELF


def _windows(pieces: Iterable[list[int]], config: PruningConfig, data: Data) -> torch.Tensor:
    """Draw `n_samples` different windows of `seq_len` tokens, at random by the seed, from pieces put end to end."""
    wanted = config.n_samples * config.seq_len
    # Four bytes a token: a list would take nine times as much.
    pool = array("i")
    for piece in pieces:
        pool.extend(piece)
        if len(pool) >= min(POOL_FACTOR * wanted, wanted + MAX_SURPLUS):
            break
    data.report()
    available = len(pool) // config.seq_len
    if available < config.n_samples:
        raise ValueError(
            f"{data.name} is too short: it has {available} windows of {config.seq_len} tokens and n_samples is "
            f"{config.n_samples}. Lower n_samples or seq_len, or calibrate on more text."
        )
    windows = torch.tensor(pool[: available * config.seq_len]).view(available, config.seq_len)
    windows = windows[: max(config.n_samples, min(available, POOL_FACTOR * config.n_samples))]
    return windows[drawn(len(windows), config)].long()


def _tokenized_at_once(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Tokens of texts in large pieces: a call per line would cost more than the forward passes."""
    pending, pending_length = [], 0
    for text in texts:
        pending.append(text)
        pending_length += len(text)
        if pending_length > 1_000_000:
            yield _tokenized(detokenize("".join(pending)), tokenizer)
            pending, pending_length = [], 0
    if pending:
        yield _tokenized(detokenize("".join(pending)), tokenizer)


def _tokenized(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: a text longer than the model's context is what we want here, not a reason to warn.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _check_tokens(calibration: Calibration, model: PreTrainedModel) -> None:
    """Refuse what would end in an index error, or in a loss of no tokens."""
    input_ids, mask = calibration.input_ids, calibration.attention_mask
    smallest, largest = int(input_ids.min()), int(input_ids.max())
    vocab_size = model.config.get_text_config().vocab_size
    if smallest < 0:
        raise ValueError(
            f"The calibration tokens hold token {smallest}, and tokens start at 0; give input_ids rather than labels, "
            f"and an attention_mask that is 0 where there is padding."
        )
    if largest >= vocab_size:
        raise ValueError(
            f"The calibration tokens hold token {largest}, beyond the model's vocabulary of {vocab_size}; were they "
            f"made by another tokenizer? Use the model's own, or make room with model.resize_token_embeddings()."
        )
    _check_length(longest(calibration), model)
    if not counted_targets(input_ids, mask).any():
        windows = f"{len(input_ids)} windows of seq_len {input_ids.shape[1]}"
        masked = "" if mask is None else f" with {calibration.num_tokens} tokens that attention_mask does not hide"
        raise ValueError(
            f"The calibration has no token to predict from the one before it: it is {windows}{masked}. Give windows "
            f"of two tokens or more{'' if mask is None else ', and a mask that is 1 where they are no padding'}."
        )


def _check_length(tokens: int, model: PreTrainedModel) -> None:
    positions = _learned_positions(model)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"Calibration windows of {tokens} tokens are longer than the {positions} positions that the model has "
            f"learned; lower seq_len to {positions} or less, or cut the tokens."
        )


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Positions that the model has an embedding for; `None` where it computes them, whatever its config says."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words)
    # OPT's has rows before its first position.
    learned = any(table.num_embeddings - getattr(table, "offset", 0) == longest for table in tables)
    return longest if learned else None
