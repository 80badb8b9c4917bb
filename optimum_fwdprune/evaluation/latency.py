"""Speed of prefill and of batch-1 decoding."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Median tokens per second.

    Args:
        prefill (`float`): prompt tokens per second of one forward pass.
        decode (`float`): new tokens per second at batch size 1.
    """

    prefill: float
    decode: float


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel, prompt_tokens: int = 256, new_tokens: int = 16, repeats: int = 3, batch_size: int = 4
) -> Speed:
    """Time prefill of `batch_size` prompts, and greedy decoding of one, after a warm-up.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode.
        prompt_tokens, new_tokens (`int`): lengths.
        repeats (`int`, defaults to 3): the median of this many runs is returned.
        batch_size (`int`, defaults to 4): prompts in the prefill.
    """
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocab_size, (batch_size, prompt_tokens), generator=generator).to(model.device)

    def prefill():
        model(input_ids=prompts, use_cache=False, logits_to_keep=1)

    def decode():
        model.generate(
            prompts[:1, :8],
            attention_mask=torch.ones_like(prompts[:1, :8]),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

    return Speed(
        prefill=prompts.numel() / _median_seconds(prefill, repeats, model.device),
        decode=new_tokens / _median_seconds(decode, repeats, model.device),
    )


def _median_seconds(run, repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    # The first run pays for kernels and caches.
    return statistics.median(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
