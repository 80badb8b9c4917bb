"""Speed of prefill and of batch-1 decoding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..utils import median_seconds


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
    models: Sequence[PreTrainedModel],
    prompt_tokens: int = 256,
    new_tokens: int = 16,
    repeats: int = 3,
    batch_size: int = 4,
) -> list[Speed]:
    """Time prefill of `batch_size` prompts, and greedy decoding of one, after a warm-up.

    The models take turns, so that whatever else the machine does slows them all: compare the results of one call.

    Args:
        models (sequence of `PreTrainedModel`): causal language models in eval mode, of one vocabulary.
        prompt_tokens, new_tokens (`int`): lengths.
        repeats (`int`, defaults to 3): the median of this many runs is returned.
        batch_size (`int`, defaults to 4): prompts in the prefill.
    """
    vocab_size = models[0].config.get_text_config().vocab_size
    prompts = torch.randint(vocab_size, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0))

    def prefill(model):
        model(input_ids=prompts.to(model.device), use_cache=False, logits_to_keep=1)

    def decode(model):
        prompt = prompts[:1, :8].to(model.device)
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

    def timed(run) -> list[float]:
        return median_seconds([functools.partial(run, model) for model in models], repeats, models[0].device)

    seconds = zip(timed(prefill), timed(decode))
    return [Speed(prompts.numel() / prefilling, new_tokens / decoding) for prefilling, decoding in seconds]
