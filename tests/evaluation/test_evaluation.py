"""Perplexity against a plain loop, and speed that tells a large model from a small one."""

import math

import pytest
import tiny
import torch

from optimum_fwdprune.evaluation import measure_speed, perplexity


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@torch.no_grad()
def test_perplexity_is_that_of_a_plain_loop(dense, tokens, batch_size):
    total, count = 0.0, 0
    for window in tokens:
        logits = dense(window[None]).logits[0].double()
        for position in range(len(window) - 1):
            total -= float(logits[position].log_softmax(0)[window[position + 1]])
            count += 1

    assert perplexity(dense, tokens, batch_size) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (0, 1)])
def test_windows_too_short_to_predict_anything_are_refused(shape):
    with pytest.raises(ValueError, match="seq_len >= 2"):
        perplexity(tiny.make_model("llama_gqa_biases"), torch.zeros(shape, dtype=torch.int64))


def test_a_model_of_many_times_the_work_is_slower():
    models = [tiny.make_model("llama_mha_tied", num_hidden_layers=layers) for layers in (1, 24)]
    small, large = measure_speed(models, prompt_tokens=32, new_tokens=4)

    assert small.prefill > 2 * large.prefill > 0
    assert small.decode > 2 * large.decode > 0
