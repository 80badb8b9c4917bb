"""Calibration text that the model itself writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from ..loading.offloading import input_device, lies_on_disk
from ..runs import ranks
from ..runs.progress import progress
from ..runs.randomness import seeded_generator
from ..runs.resume import Resume
from .texts import SELF


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..request.config import PruningConfig


@torch.no_grad()
def sample_from_model(
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
