"""Text that a model generates itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from ..loading.offloading import input_device, lies_on_disk
from ..loading.tokenizers import tokens_around
from ..runs import ranks
from ..runs.progress import progress
from ..runs.randomness import seeded_generator
from ..runs.resume import Resume
from .texts import SELF


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How much text a model generates.

    Args:
        n_samples (`int`): number of windows.
        seq_len (`int`): tokens per window.
        batch_size (`int`): windows per forward pass of scoring; several times as many are generated together.
        seed (`int`): seed of the text.
        with_first_tokens (`bool`, defaults to `False`): whether the windows of every second batch begin with a random
            token, so that they are more varied.
    """

    n_samples: int
    seq_len: int
    batch_size: int
    seed: int
    with_first_tokens: bool = False


@torch.no_grad()
def sample_from_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    wanted: Sampling,
    resume: Resume | None = None,
) -> torch.Tensor:
    """Let the model generate windows of tokens from its BOS token at temperature 1: int64 `[n_samples, seq_len]`.

    Windows start with BOS where the tokenizer writes it before a text.
    Every batch has its own seed, so that several processes generate the same tokens as one.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate text for {SELF!r}; name another source.")
    if lies_on_disk(model):
        raise ValueError(
            f"{SELF!r} would read the whole model from disk for every token that it generates; name "
            f"another source, such as a text file."
        )
    start = None
    for holder in (tokenizer, model.generation_config, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(holder, name, None)
            if start is None and value is not None:
                start = value[0] if isinstance(value, list) else value
    if start is None:
        raise ValueError(f"The model has no BOS or EOS token to start from; {SELF!r} needs one.")

    # Where BOS stays, there is one generated token less.
    left_out = 0 if tokenizer is not None and tokens_around(tokenizer)[0] == [start] else 1
    device = input_device(model)
    windows = torch.zeros(wanted.n_samples, wanted.seq_len, dtype=torch.int64)
    # Batches are larger than in scoring, since a decoding step takes about as long for 32 sequences as for 8.
    size = 4 * wanted.batch_size
    batches = ranks.own(list(enumerate(windows.split(size))))
    stage = (resume or Resume()).stage("calibration", own=True, size=size)

    def restored(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> int:
        windows.copy_(tensors["windows"])
        return numbers["batches"]

    done = stage.load(restored) or 0
    with _own_random_state(device) as seed_generators, _plain_sampling(model, pad_token_id=start) as plain:
        remaining = batches[done:]
        bar = progress(remaining, "Sampling text", total=len(batches), unit="batch", initial=done)
        for number, batch in bar:
            prompts = torch.full((len(batch), 1), start)
            if wanted.with_first_tokens and number % 2:
                prompts = torch.cat([prompts, _first_tokens(model, tokenizer, len(batch), (wanted.seed, number))], 1)
            # With equal lengths EOS is never generated, and every sequence fills its window.
            plain.min_new_tokens = plain.max_new_tokens = wanted.seq_len + left_out - prompts.shape[1]
            seed_generators(seeded_generator(wanted.seed, number).initial_seed())
            written = model.generate(  # type: ignore[operator]
                prompts.to(device),
                attention_mask=torch.ones_like(prompts, device=device),
                generation_config=plain,
            )[:, left_out:]
            if written.shape != batch.shape:
                raise ValueError(
                    f"{type(model).__name__}.generate() returned {list(written.shape)} tokens, but "
                    f"{list(batch.shape)} were requested; use another source than {SELF!r}."
                )
            batch[:] = written
            done += 1
            stage.save_now_and_then(lambda: ({"windows": windows}, {"batches": done}))  # noqa: B023  called at once
    return ranks.summed(windows)


def _first_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, seed: tuple[int, int]
) -> torch.Tensor:
    """Return random tokens that are not special, int64 `[count, 1]`."""
    vocab_size = model.config.get_text_config().vocab_size
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    if tokenizer is not None:
        # The embeddings may have more rows than there are tokens.
        vocab_size = min(vocab_size, len(tokenizer))
    allowed = torch.tensor([token for token in range(vocab_size) if token not in special])
    drawn = torch.randint(0, len(allowed), (count, 1), generator=seeded_generator(*seed, 1))
    return allowed[drawn]


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[Callable[[int], Any]]:
    """Yield a function that seeds the random generators of a model on `device`; restore their states afterwards.

    `torch.manual_seed` also seeds the generators of accelerators, which a model on the CPU does not use.
    """
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            yield torch.default_generator.manual_seed
        return
    # Some backends have no access to the states of their generators.
    is_known = hasattr(torch.get_device_module(device), "get_rng_state")
    devices = range(torch.accelerator.device_count()) if is_known else ()
    with torch.random.fork_rng(devices, device_type=device.type):
        yield torch.manual_seed


@contextmanager
def _plain_sampling(model: PreTrainedModel, **options: Any) -> Iterator[GenerationConfig]:
    """Yield a generation config for sampling at temperature 1, which has only EOS from the model's own one.

    The model's own config is replaced during the block: `generate()` would use its other values, such as penalties.
    """
    own = model.generation_config
    eos = getattr(own, "eos_token_id", None)
    plain = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, **options)
    model.generation_config = plain
    try:
        yield plain
    finally:
        model.generation_config = own
