"""Calibration tokens: fixed-length windows from a dataset, a file, strings, or the model itself."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from . import ranks
from .checkpoints import Checkpoint
from .offloading import input_device, lies_on_disk
from .texts import PRESETS, detokenize, load_rows, open_texts
from .utils import progress, seeded_generator


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .configuration import PruningConfig


logger = logging.get_logger(__name__)

SELF = "self"

# Windows are drawn from this many times as many tokens as asked for, so that a stream is never read to its end.
POOL_FACTOR = 8
# ... and never from more than so many tokens beyond those asked for.
MAX_SURPLUS = 2**24


@dataclass(frozen=True)
class Calibration:
    """Token windows, and where they came from.

    Args:
        input_ids (`Tensor[n_samples, seq_len]`, int64): the tokens.
        attention_mask (`Tensor[n_samples, seq_len]`, *optional*): 0 where a token is padding.
        source (`str`): where they came from, for the record.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    source: str = "tokens"

    def __post_init__(self):
        if self.input_ids.dim() != 2 or self.input_ids.numel() == 0:
            raise ValueError(
                f"Calibration tokens must be [n_samples, seq_len] and not empty; got {tuple(self.input_ids.shape)}."
            )
        if self.input_ids.is_floating_point():
            raise ValueError(f"Calibration tokens must be int64 token ids; got {self.input_ids.dtype}.")
        if self.attention_mask is not None and self.attention_mask.shape != self.input_ids.shape:
            raise ValueError("attention_mask must have the shape of input_ids.")

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


def load_calibration(
    config: PruningConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any = None,
    checkpoint: Checkpoint | None = None,
) -> Calibration:
    """Turn whatever the user names into token windows.

    Args:
        config (`PruningConfig`): `calibration` names the source where `dataset` is not given; `n_samples`, `seq_len`,
            `seed` and the `dataset_*` fields say what to take.
        model (`PreTrainedModel`): the dense model; it writes the text itself for `"self"`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for every source but tokens and `"self"`.
        dataset (*optional*): `str` (as `config.calibration`), list of strings, `datasets.Dataset`, int64 tensor
            `[n_samples, seq_len]`, or a mapping with `input_ids` and optionally `attention_mask` (a padded batch).
        checkpoint (`Checkpoint`, *optional*): where text that the model writes is kept.

    Raises:
        ValueError: on an empty or too short source, or one that is not understood.
    """
    if isinstance(dataset, torch.Tensor):
        dataset = Calibration(dataset)
    elif isinstance(dataset, Mapping) and "input_ids" in dataset:
        dataset = Calibration(dataset["input_ids"], dataset.get("attention_mask"))
    if isinstance(dataset, Calibration):
        largest, vocab_size = int(dataset.input_ids.max()), model.config.get_text_config().vocab_size
        if largest >= vocab_size:
            raise ValueError(
                f"The calibration tokens hold token {largest}, beyond the model's vocabulary of {vocab_size}; were "
                f"they made by another tokenizer?"
            )
        return dataset
    source = config.calibration if dataset is None else dataset
    if source is None:
        source = ranks.from_main(_default_source)
    if source == SELF:
        return Calibration(_sample_from_model(model, tokenizer, config, checkpoint or Checkpoint()), source=SELF)
    if tokenizer is None:
        raise ValueError(
            f"Calibrating on {source!r} needs a tokenizer: FwdPruner(model, tokenizer). {SELF!r} does not."
        )

    options = (config.dataset_config, config.dataset_split, config.dataset_column)
    name, texts = open_texts(source, *options, seed=config.seed)
    # A text that is sampled or fetched twice may not be the same twice.
    return Calibration(ranks.tensor_from_main(lambda: _windows(texts, tokenizer, config, name)), source=name)


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
        logger.warning(
            "WikiText-2 is not at hand (%s), so calibration uses text sampled from the model itself. Name a source "
            "with `calibration` to choose; HF_HUB_OFFLINE=1 uses a cached WikiText-2.",
            type(error).__name__,
        )
        return SELF


def _windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, config: PruningConfig, source: str
) -> torch.Tensor:
    """Draw `n_samples` different windows of `seq_len` tokens, at random by the seed."""
    wanted = config.n_samples * config.seq_len
    # Four bytes a token: a list would take nine times as much.
    pool = array("i")
    pending, pending_length = [], 0
    for text in texts:
        pending.append(text)
        pending_length += len(text)
        # Tokenised in large pieces: a call per line would cost more than the forward passes.
        if pending_length > 1_000_000:
            pool.extend(_tokenize(pending, tokenizer))
            pending, pending_length = [], 0
            if len(pool) >= min(POOL_FACTOR * wanted, wanted + MAX_SURPLUS):
                break
    if pending:
        pool.extend(_tokenize(pending, tokenizer))
    available = len(pool) // config.seq_len
    if available < config.n_samples:
        raise ValueError(
            f"{source} is too short: it has {available} windows of {config.seq_len} tokens and n_samples is "
            f"{config.n_samples}. Lower n_samples or seq_len, or calibrate on more text."
        )
    windows = torch.tensor(pool[: available * config.seq_len]).view(available, config.seq_len)
    windows = windows[: max(config.n_samples, min(available, POOL_FACTOR * config.n_samples))]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(config.seed))
    return windows[order[: config.n_samples]].long()


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: a text longer than the model's context is what we want here, not a reason to warn.
    return tokenizer(detokenize("".join(texts)), add_special_tokens=False, verbose=False)["input_ids"]


@torch.no_grad()
def _sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    checkpoint: Checkpoint,
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
    devices = [device] if device.type == "cuda" else []
    windows = torch.zeros(config.n_samples, config.seq_len, dtype=torch.int64)
    # Wider batches than in scoring: a decoding step costs about the same for 8 sequences as for 32.
    size = 4 * config.batch_size
    batches = ranks.own(list(enumerate(windows.split(size))))
    stage = checkpoint.stage("calibration", own=True, size=size)

    def take_up(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> int:
        windows.copy_(tensors["windows"])
        return numbers["batches"]

    done = stage.load(take_up) or 0
    with torch.random.fork_rng(devices):
        for number, batch in progress(batches[done:], "Sampling calibration text", unit="batch"):
            torch.manual_seed(seeded_generator(config.seed, number).initial_seed())
            batch[:] = model.generate(  # type: ignore[operator]
                torch.full((len(batch), 1), start, device=device),
                attention_mask=torch.ones((len(batch), 1), dtype=torch.int64, device=device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                # Equal lengths: without an EOS every sequence runs to the end of its window.
                min_new_tokens=config.seq_len,
                max_new_tokens=config.seq_len,
                pad_token_id=start,
            )[:, 1:]
            done += 1
            stage.save_now_and_then(lambda: ({"windows": windows}, {"batches": done}))  # noqa: B023  called at once
    return ranks.summed(windows)
