"""Calibration tokens: fixed-length windows from a dataset, a file, strings, or the model itself."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ..loading.offline import offline_variable
from ..loading.offloading import input_device, lies_on_disk
from ..runs import ranks
from ..runs.loggers import get_logger
from ..runs.progress import progress
from ..runs.randomness import seeded_generator
from ..runs.resume import Resume
from .chats import chat_text, check_template
from .messages import UnusableRow, refusing_all
from .rows import CHAT, TOKENS, Data
from .texts import (
    PRESETS,
    SELF,
    always_text,
    detokenize,
    load_rows,
    open_rows,
    texts_of,
)
from .tokens import Tokens, check_table, present_tokens


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..request.config import PruningConfig


logger = get_logger(__name__)

# Windows are drawn from this many times as many tokens as asked for, so that a stream is never read to its end.
POOL_FACTOR = 8
# ... and never from more than so many tokens beyond those asked for.
MAX_SURPLUS = 2**24


@dataclass(frozen=True)
class Calibration:
    """Token windows, and where they came from.

    Args:
        input_ids (`Tensor[n_samples, seq_len]`, int64): the tokens; other integers are converted.
        attention_mask (`Tensor[n_samples, seq_len]`, *optional*): 0 where a token is padding, of any dtype; converted
            to int64.
        source (`str`): where they came from, for the record.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    source: str = "tokens"

    def __post_init__(self):
        for name in ("input_ids", "attention_mask"):
            values = getattr(self, name)
            if not isinstance(values, torch.Tensor) and (values is not None or name == "input_ids"):
                raise ValueError(
                    f"{name} of a Calibration must be a tensor [n_samples, seq_len]; got a {type(values).__name__}. "
                    f"Give torch.tensor(...), or lists and arrays as dataset."
                )
            with refusing_all():
                check_table(values, name)
        if self.input_ids.dim() != 2 or self.input_ids.numel() == 0:
            raise ValueError(
                f"Calibration tokens must be [n_samples, seq_len] and not empty; got {tuple(self.input_ids.shape)}."
            )
        dtype = self.input_ids.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise ValueError(f"Calibration tokens must be int64 token ids; got {dtype}. Give a tokenizer's input_ids.")
        # Embeddings and losses take few of the integer types that tokens are kept in.
        object.__setattr__(self, "input_ids", self.input_ids.long())
        if self.attention_mask is None:
            return
        if self.attention_mask.shape != self.input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {list(self.input_ids.shape)}; it has "
                f"{list(self.attention_mask.shape)}."
            )
        with refusing_all():
            present_tokens(self.attention_mask)
        object.__setattr__(self, "attention_mask", self.attention_mask.long())

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield `(input_ids, attention_mask)` of at most `batch_size` windows each."""
        masks = [None] * len(self.input_ids) if self.attention_mask is None else self.attention_mask.split(batch_size)
        return zip(self.input_ids.split(batch_size), masks)

    def windows(self, which: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `(input_ids, attention_mask)` of some windows."""
        return self.input_ids[which], None if self.attention_mask is None else self.attention_mask[which]

    def split(self, every: int) -> tuple[Calibration, Calibration | None]:
        """Return most windows, and every so-many-th one apart from them; `None` where there are too few to spare."""
        # Of those that hold more than padding.
        mask = self.attention_mask
        present = torch.arange(len(self.input_ids)) if mask is None else mask.any(1).nonzero().flatten()
        which = present[every - 1 :: every] if len(present) >= every else present[-1:]
        if len(present) < 2:
            return self, None
        held_out = torch.zeros(len(self.input_ids), dtype=torch.bool)
        held_out[which.to(held_out.device)] = True
        most, others = (Calibration(*self.windows(part), self.source) for part in (~held_out, held_out))
        return most, others

    def own_share(self) -> Calibration | None:
        """Return the windows that this process of a run measures; `None` where there are fewer than processes."""
        which = slice(ranks.rank(), None, ranks.world_size())
        return Calibration(*self.windows(which), self.source) if which.start < len(self.input_ids) else None

    def __len__(self) -> int:
        return len(self.input_ids)

    def after(self, count: int) -> Calibration:
        """Return the windows behind the first `count`."""
        return Calibration(*self.windows(slice(count, None)), self.source)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.bool().sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, and of their padding where there is some, shortened."""
        digest = hashlib.sha256(self.input_ids.to(torch.int64).cpu().numpy().tobytes())
        if self.attention_mask is not None:
            digest.update(self.attention_mask.bool().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def counted_targets(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which predicted tokens count, bool `[batch_size, seq_len - 1]`: neither they nor the ones before pad."""
    if attention_mask is None:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    mask = attention_mask.bool()
    return mask[:, 1:] & mask[:, :-1]


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
    elif (table := _table_of(dataset)) is not None:
        calibration = _of_table(table, config)
    else:
        calibration = _from_rows(config, model, tokenizer, dataset, resume)
    _check_tokens(calibration, model)
    return calibration


def _table_of(dataset: Any) -> Calibration | None:
    """Token ids that are a table already, or one row; `None` for anything else."""
    mask = None
    if isinstance(dataset, Mapping) and "input_ids" in dataset:
        dataset, mask = dataset["input_ids"], dataset.get("attention_mask")
    elif not isinstance(dataset, torch.Tensor) and not isinstance(dataset, np.ndarray):
        return None
    input_ids, hidden = _as_table(dataset), None if mask is None else _as_table(mask)
    if input_ids is None or (hidden is None) != (mask is None):
        return None
    return Calibration(input_ids, hidden)


def _as_table(values: Any) -> torch.Tensor | None:
    """What tokenizers return: a tensor, an array, or a list of lists, tensors or arrays of one length; or one row."""
    if isinstance(values, np.ndarray):
        # A copy, since PyTorch takes no array that runs backwards or has its bytes in another order.
        values = values.astype(values.dtype.newbyteorder("="), order="C")
    elif isinstance(values, str) or not isinstance(values, (torch.Tensor, Sequence)):
        return None
    elif not isinstance(values, torch.Tensor):
        values = [row.tolist() if hasattr(row, "tolist") else row for row in values]
    try:
        table = values if isinstance(values, torch.Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError):
        # Rows of different lengths, or no numbers.
        return None
    if isinstance(values, list) and table.dim() > 2:
        # Batches.
        return None
    return table[None] if table.dim() == 1 else table


def _of_table(table: Calibration, config: PruningConfig) -> Calibration:
    """The windows of a table: its rows, unless they are longer or more than asked for."""
    input_ids, mask = table.input_ids, table.attention_mask
    if _longest(table) > config.seq_len:
        masks: Any = [None] * len(input_ids) if mask is None else mask
        rows = ({"input_ids": ids, "attention_mask": present} for ids, present in zip(input_ids, masks))
        return _of_token_rows(Data(table.source, rows), config)
    if len(input_ids) <= config.n_samples:
        return table
    logger.warning(
        "The calibration tokens are %d windows and n_samples is %d, so that so many of them are drawn; raise "
        "n_samples to take more.",
        len(input_ids),
        config.n_samples,
    )
    return Calibration(*table.windows(_drawn(len(input_ids), config).to(input_ids.device)), table.source)


def _of_token_rows(data: Data, config: PruningConfig) -> Calibration:
    """Windows of rows of token ids: rows that are short enough, and whole windows of longer ones."""
    shortened = False

    def windows_of(row: Tokens) -> list[torch.Tensor]:
        nonlocal shortened
        ids = row.without_padding().input_ids
        if len(ids) < 2:
            raise UnusableRow(f"it has {len(ids)} tokens that are no padding, and nothing to predict")
        if len(ids) <= config.seq_len:
            return [torch.from_numpy(ids)]
        shortened = True
        return list(torch.from_numpy(ids[: len(ids) // config.seq_len * config.seq_len]).split(config.seq_len))

    windows = list(islice(data.converted(windows_of), POOL_FACTOR * config.n_samples))
    data.report()
    if shortened and len(windows) < config.n_samples:
        logger.warning(
            "%s has %d windows of up to %d tokens, and n_samples is %d; all of them are used.",
            data.name,
            len(windows),
            config.seq_len,
            config.n_samples,
        )
    if len(windows) > config.n_samples:
        windows = [windows[place] for place in _drawn(len(windows), config)]
    input_ids = pad_sequence(windows, batch_first=True)
    lengths = torch.tensor([[len(window)] for window in windows])
    mask = torch.arange(input_ids.shape[1]) < lengths
    return Calibration(input_ids, None if mask.all() else mask.long(), data.name)


def _drawn(count: int, config: PruningConfig) -> torch.Tensor:
    """Which `n_samples` of so many windows are taken."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))[: config.n_samples]


def _longest(calibration: Calibration) -> int:
    """Tokens of the longest window; padding takes no position."""
    mask = calibration.attention_mask
    return calibration.input_ids.shape[1] if mask is None else int(mask.bool().sum(1).max())


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
    _check_length(_longest(calibration), model)
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
        return Calibration(_sample_from_model(model, tokenizer, config, resume or Resume()), source=SELF)

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
            taken = _of_token_rows(data, config)
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
    return windows[_drawn(len(windows), config)].long()


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


@torch.no_grad()
def _sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    resume: Resume,
) -> torch.Tensor:
    """Let the model write `n_samples` windows of `seq_len` tokens, from its BOS token at temperature 1.

    Every batch has a seed of its own, so that several processes write what one would.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot write text for calibration={SELF!r}; name another source.")
    if lies_on_disk(model):
        raise ValueError(
            f"calibration={SELF!r} would read all of the model from disk for every token that it writes; name another "
            f"source, such as a text file."
        )
    start = None
    for holder in (tokenizer, model.generation_config, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(holder, name, None)
            if start is None and value is not None:
                start = value[0] if isinstance(value, list) else value
    if start is None:
        raise ValueError(f"The model has no BOS or EOS token to start from; calibration={SELF!r} needs one.")

    device = input_device(model)
    windows = torch.zeros(config.n_samples, config.seq_len, dtype=torch.int64)
    # Wider batches than in scoring: a decoding step costs about the same for 8 sequences as for 32.
    size = 4 * config.batch_size
    batches = ranks.own(list(enumerate(windows.split(size))))
    stage = resume.stage("calibration", own=True, size=size)

    def take_up(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> int:
        windows.copy_(tensors["windows"])
        return numbers["batches"]

    done = stage.load(take_up) or 0
    # Equal lengths: without an EOS every sequence runs to the end of its window.
    length = {"min_new_tokens": config.seq_len, "max_new_tokens": config.seq_len}
    with _own_random_state(device) as seed_generators, _plain_sampling(model, pad_token_id=start, **length) as plain:
        left = batches[done:]
        bar = progress(left, "Sampling calibration text", total=len(batches), unit="batch", initial=done)
        for number, batch in bar:
            seed_generators(seeded_generator(config.seed, number).initial_seed())
            written = model.generate(  # type: ignore[operator]
                torch.full((len(batch), 1), start, device=device),
                attention_mask=torch.ones((len(batch), 1), dtype=torch.int64, device=device),
                generation_config=plain,
            )[:, 1:]
            if written.shape != batch.shape:
                raise ValueError(
                    f"{type(model).__name__}.generate() wrote {list(written.shape)} tokens where {list(batch.shape)} "
                    f"were asked for; name another source than calibration={SELF!r}."
                )
            batch[:] = written
            done += 1
            stage.save_now_and_then(lambda: ({"windows": windows}, {"batches": done}))  # noqa: B023  called at once
    return ranks.summed(windows)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[Callable[[int], Any]]:
    """Yield what seeds the generators that a model on `device` draws from, and give them back their states afterwards.

    `torch.manual_seed` seeds those of every accelerator, and a model on the CPU draws from none of them.
    """
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            yield torch.default_generator.manual_seed
        return
    # Some backends do not tell the states of their generators.
    is_known = hasattr(torch.get_device_module(device), "get_rng_state")
    devices = range(torch.accelerator.device_count()) if is_known else ()
    with torch.random.fork_rng(devices, device_type=device.type):
        yield torch.manual_seed


@contextmanager
def _plain_sampling(model: PreTrainedModel, **options: Any) -> Iterator[GenerationConfig]:
    """Let the model write at temperature 1, and take nothing but its EOS from its own generation config.

    That one is put aside, since `generate()` fills in from it whatever is not asked for: penalties, beams, stops.
    """
    own = model.generation_config
    eos = getattr(own, "eos_token_id", None)
    plain = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, **options)
    model.generation_config = plain
    try:
        yield plain
    finally:
        model.generation_config = own
