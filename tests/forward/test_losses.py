"""The calibration loss against a plain loop over tokens."""

import math

import pytest
import torch

from optimum_fwdprune.forward import losses


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, 11, generator=generator), torch.randint(0, 11, (3, 7), generator=generator)


def plain_loop(logits, input_ids, mask, row):
    total, count = 0.0, 0
    for position in range(1, input_ids.shape[1]):
        if mask[row, position] and mask[row, position - 1]:
            values = [math.exp(float(value)) for value in logits[row, position - 1].double()]
            total -= math.log(values[int(input_ids[row, position])] / sum(values))
            count += 1
    return total, count


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_every_token_counts_once_and_padding_never(batch, at_once, monkeypatch):
    """However many logits are turned into probabilities at once."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    logits, input_ids = batch
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, :2] = 0
    mask[1, 5:] = 0
    # What a model says about padding may be anything.
    logits[0, :2] = torch.nan
    sums, counts = losses.next_token_nll(logits, input_ids, mask)

    assert sums.dtype == torch.float64
    for row in range(3):
        total, count = plain_loop(logits, input_ids, mask, row)
        assert float(sums[row]) == pytest.approx(total, rel=1e-6)
        assert int(counts[row]) == count
    assert counts.tolist() == [4, 4, 6]


def test_half_precision_logits_are_summed_in_float32(batch):
    logits, input_ids = batch
    expected, _ = losses.next_token_nll(logits.bfloat16().float(), input_ids)

    assert torch.equal(losses.next_token_nll(logits.bfloat16(), input_ids)[0], expected)
