"""Calibration tokens from a dataset, a file, strings, token ids, or the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..architectures.positions import positions_of
from ..loading.offline import offline_variable
from ..runs import ranks
from ..runs.loggers import get_logger
from .amount import Amount
from .calibration import Calibration, counted_targets, joined
from .chats import chat_text, check_template
from .images import ImageRows
from .mixing import Mixing
from .mixtures import Mixture
from .rows import CHAT, TOKENS, Data
from .sampling import Sampling, sample_from_model
from .tables import longest, pool_of, table_of, windows_of_rows, windows_of_table
from .text_windows import CHARACTERS_PER_TOKEN, tokenized, tokenized_at_once, windows_of_text
from .texts import (
    PRESETS,
    SELF,
    always_text,
    is_self,
    load_rows,
    open_rows,
    texts_of,
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..request.config import PruningConfig


logger = get_logger(__name__)

# Generates windows of text with a model, as [`sample_from_model`] does.
Sample = Callable[..., torch.Tensor]


def load_calibration(
    config: PruningConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any = None,
    sample: Sample = sample_from_model,
    more: int = 0,
) -> Calibration:
    """Return the calibration tokens of a request.

    Text and chats, as the tokenizer's chat template writes them, are joined end to end and cut into windows of
    `seq_len` tokens, of which `n_samples` are drawn at random by `seed`. Every window starts with the special tokens
    that the tokenizer writes before a text, such as BOS. Rows of token ids are not joined: a row of up
    to `seq_len` tokens, not counting padding, is a window, and a longer one is cut into full windows, without its
    remainder. If there are more than `n_samples` windows, `n_samples` of them are drawn. By default, `n_samples`
    follows the width of the model (see `data/amount.py`), and shorter text is used as it is.

    Args:
        config (`PruningConfig`): `calibration` names the source if `dataset` is `None`; `n_samples`, `seq_len`, `seed`
            and the `dataset_*` fields apply to any source.
        model (`PreTrainedModel`): the dense model, which generates the text for `"self"`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required for every source but tokens and `"self"`.
        dataset (*optional*): a `str` (as `config.calibration`); text, chats or rows in lists, generators, datasets or
            pandas; or token ids: a tensor or array `[tokens]` or `[sequences, tokens]`, a tokenizer's batch with its
            `attention_mask`, rows with `input_ids`, lists of any lengths. A `Calibration` is used unchanged. A
            [`Mixture`], or a list of names such as `["wikitext2", "code.jsonl:0.5"]`, divides `n_samples` among
            several sources by their weights. For a multimodal model also rows with images (see
            [`~optimum_fwdprune.data.images.ImageRows`]).
        sample (`Callable`, defaults to [`sample_from_model`]): generates the text for `"self"`.
        more (`int`, defaults to 0): number of windows in addition to `n_samples`.

    Raises:
        ValueError: where the source is empty, too short or of an unknown kind, or its tokens are beyond the vocabulary
            or include none to predict.
    """
    amount = Amount.of(config, model)
    config = dataclasses.replace(config, n_samples=amount.windows + more)
    return _loaded(config, model, tokenizer, dataset, sample, amount.is_default)


def _loaded(
    config: PruningConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    sample: Sample,
    takes_less: bool,
) -> Calibration:
    """Return the calibration tokens of a request with a number of windows, or fewer if `takes_less` is set."""
    if isinstance(dataset, Calibration):
        calibration = dataset
    elif isinstance(dataset, ImageRows):
        calibration = dataset.calibration(config, model)
    elif (mixture := _mixture(config, dataset)) is not None:
        calibration = _from_mixture(mixture, config, model, tokenizer, sample, takes_less)
    elif (table := table_of(dataset)) is not None:
        calibration = windows_of_table(table, config)
    else:
        calibration = _from_rows(config, model, tokenizer, dataset, sample, takes_less)
    _check_tokens(calibration, model)
    return calibration


def _mixture(config: PruningConfig, dataset: Any) -> Mixture | None:
    """Return the mixture that `dataset`, or else the request, names; `None` where it names one source."""
    if dataset is None and isinstance(config.calibration, list):
        return Mixture.of_names(config.calibration)
    return Mixture.of(dataset)


def _from_mixture(
    mixture: Mixture,
    config: PruningConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    sample: Sample,
    takes_less: bool,
) -> Calibration:
    """Return the windows of all sources in an order that the seed determines; every source has its share of them."""
    counts, parts = mixture.divided(config.num_windows), {}
    # Text that the model generates takes minutes, so that errors of other sources come before it.
    for number in sorted(range(len(counts)), key=lambda number: is_self(mixture.sources[number])):
        source, count = mixture.sources[number], counts[number]
        name = str(source) if isinstance(source, (str, Path)) else f"source {number + 1}"
        own = dataclasses.replace(config, n_samples=count)
        try:
            part = _loaded(own, model, tokenizer, source, sample, takes_less)
        except ValueError as error:
            raise ValueError(f"Of the mixture ({mixture}), {name} cannot be used: {error}") from error
        if part.inputs:
            raise ValueError(f"Rows with images cannot be mixed with other data; calibrate on {name} alone.")
        if len(part) < count and not takes_less:
            raise ValueError(
                f"Of the mixture ({mixture}), {name} has {len(part)} windows, and its share of n_samples is {count}. "
                f"Lower n_samples or its weight."
            )
        parts[number] = part.part(slice(count))
    return joined([parts[number] for number in range(len(counts))], str(mixture), config.seed)


def _from_rows(
    config: PruningConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    sample: Sample,
    takes_less: bool,
) -> Calibration:
    source = config.calibration if dataset is None else dataset
    if source is None:
        source = ranks.from_main(_default_source)
    if is_self(source):
        _check_length(config.seq_len, model)
        sampling = Sampling(config.num_windows, config.seq_len, config.batch_size, config.seed)
        return Calibration(sample(model, tokenizer, sampling), source=SELF)

    def needed_tokenizer() -> PreTrainedTokenizerBase:
        if tokenizer is None:
            name = repr(str(source)) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
            raise ValueError(
                f"Calibrating on {name} needs a tokenizer: FwdPruner(model, tokenizer). {SELF!r} does not."
            )
        # The length is checked before a dataset is read.
        _check_length(config.seq_len, model)
        return tokenizer

    if always_text(source):
        needed_tokenizer()
    mixing = Mixing(config.seed, characters=CHARACTERS_PER_TOKEN * pool_of(config) * config.seq_len)
    name, rows = open_rows(source, config.dataset_config, config.dataset_split, mixing)

    def read() -> torch.Tensor:
        data = Data(name, rows, config.dataset_column)
        if data.kind == TOKENS:
            taken = windows_of_rows(data, config)
            mask = torch.ones_like(taken.input_ids) if taken.attention_mask is None else taken.attention_mask
            return torch.stack([taken.input_ids, mask])
        writer = needed_tokenizer()
        if data.kind == CHAT:
            check_template(writer)
            pieces = data.converted(lambda chat: [tokenized(chat_text(chat, writer), writer)])
        else:
            pieces = tokenized_at_once(texts_of(data, source), writer, pool_of(config) * config.seq_len)
        windows = windows_of_text(pieces, config, data, writer, takes_less)
        return torch.stack([windows, torch.ones_like(windows)])

    # The main process reads for all: a text that is sampled or downloaded twice may differ.
    input_ids, mask = ranks.tensor_from_main(read)
    return Calibration(input_ids, None if mask.all() else mask, source=name)


def _default_source() -> str:
    """Return the default source: WikiText-2 if the Hub or its cache has it, else the model's own text."""
    from huggingface_hub import HfApi, is_offline_mode

    try:
        if not is_offline_mode():
            # This request is short. Without a network, loading the dataset would retry for half a minute.
            HfApi().dataset_info(PRESETS["wikitext2"]["path"], timeout=5)
        next(iter(load_rows(**PRESETS["wikitext2"])))
        return "wikitext2"
    except Exception as error:  # The network raises errors of many types; the default is the same for all.
        if is_offline_mode():
            why = f"it is not in the cache, and {offline_variable()} is set, which prevents downloads"
            way_out = "unset that variable"
        else:
            why, way_out = type(error).__name__, "set HF_HUB_OFFLINE=1 if WikiText-2 is in the cache"
        logger.warning(
            "WikiText-2 is not available (%s), so that calibration uses text sampled from the model itself. Set "
            "`calibration` to a text file to use that instead, or %s.",
            why,
            way_out,
        )
        return SELF


def _check_tokens(calibration: Calibration, model: PreTrainedModel) -> None:
    """Raise `ValueError` on tokens that would cause an index error, or a loss over no tokens."""
    input_ids, mask = calibration.input_ids, calibration.attention_mask
    smallest, largest = int(input_ids.min()), int(input_ids.max())
    vocab_size = model.config.get_text_config().vocab_size
    if smallest < 0:
        raise ValueError(
            f"The calibration data contains token {smallest}, but tokens start at 0; pass input_ids and not labels, "
            f"with an attention_mask that is 0 for padding."
        )
    if largest >= vocab_size:
        raise ValueError(
            f"The calibration data contains token {largest}, beyond the model's vocabulary of {vocab_size}; was it "
            f"made with another tokenizer? Use the model's own, or call model.resize_token_embeddings()."
        )
    _check_length(longest(calibration), model)
    if not counted_targets(input_ids, mask).any():
        windows = f"{len(input_ids)} windows of seq_len {input_ids.shape[1]}"
        masked = "" if mask is None else f" with {calibration.num_tokens} tokens that attention_mask does not hide"
        raise ValueError(
            f"The calibration data has no token to predict from the one before it: it is {windows}{masked}. Pass "
            f"windows of two tokens or more{'' if mask is None else ', and a mask that is 1 for all but padding'}."
        )


def _check_length(tokens: int, model: PreTrainedModel) -> None:
    positions = _learned_positions(model)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"Calibration windows of {tokens} tokens are longer than the model's {positions} learned positions; lower "
            f"seq_len to {positions} or less, or cut the tokens."
        )


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Return the number of position embeddings; `None` where the model computes positions without a limit."""
    longest = positions_of(model.config)
    words = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words)
    # OPT's table has additional rows before its first position.
    learned = any(table.num_embeddings - getattr(table, "offset", 0) == longest for table in tables)
    return longest if learned else None
