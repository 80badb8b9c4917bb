"""Perplexity against a plain loop: no token dropped, none counted twice, whatever the windows."""

import math

import evaluate
import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import PERPLEXITY_METRIC, TextLoss, perplexity, text_loss, texts_loss, window_losses


@torch.no_grad()
def plain_loop(model, ids, max_length, stride):
    """Σ negative log-likelihoods and tokens, a window at a time, a token at a time."""
    total, count, predicted = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        window = ids[start : start + max_length]
        logits = model(window[None]).logits[0].double()
        for place in range(1, len(window)):
            if start + place > predicted:
                total -= float(logits[place - 1].log_softmax(0)[window[place]])
                count += 1
        predicted = start + len(window) - 1
        if start + max_length >= len(ids):
            break
    return total, count


@pytest.fixture
def text():
    return torch.randint(0, tiny.VOCAB, (101,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@torch.no_grad()
def test_of_equal_windows(dense, tokens, batch_size):
    total, count = 0.0, 0
    for window in tokens:
        nll, predicted = plain_loop(dense, window, len(window), len(window))
        total, count = total + nll, count + predicted

    assert perplexity(dense, tokens, batch_size) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("max_length", "stride"), [(16, 16), (16, 4), (16, 15), (24, 7), (100, 100), (128, 64), (2, 1)]
)
def test_of_a_text_in_windows(dense, text, max_length, stride):
    nll, count = plain_loop(dense, text, max_length, stride)
    found = text_loss(dense, text, max_length, stride, batch_size=3)

    assert found.tokens == count
    assert found.nll == pytest.approx(nll, rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)


@pytest.mark.parametrize(("max_length", "stride"), [(16, None), (16, 4), (2, None), (128, None)])
@torch.no_grad()
def test_windows_start_with_the_tokens_that_the_tokenizer_writes_before_a_text(dense, max_length, stride):
    tokenizer = tiny.make_tokenizer(begins_texts=True)
    bos, *ids = tokenizer("the quick brown fox jumps over the lazy dog " * 4)["input_ids"]
    nll, counted = 0.0, 0
    for start in range(0, len(ids), stride or max_length - 1):
        window = torch.tensor([bos, *ids[start : start + max_length - 1]])
        predicted = dense(window[None]).logits[0, :-1].double().log_softmax(-1)
        # The first token of the text is predicted too, from BOS.
        new = range(counted - start, len(window) - 1)
        nll -= sum(float(predicted[place, window[place + 1]]) for place in new)
        counted += len(new)
    found = texts_loss(dense, tokenizer, ["the quick brown fox jumps over the lazy dog " * 4], max_length, stride)

    assert found.tokens == counted == len(ids)
    assert found.nll == pytest.approx(nll, rel=1e-4)


@pytest.mark.parametrize("tokens_in_text", range(2, 40))
def test_overlapping_windows_predict_every_token_but_the_first_once(tokens_in_text):
    model = tiny.make_model("llama_gqa_biases")
    text = torch.arange(tokens_in_text) % tiny.VOCAB

    assert text_loss(model, text, 8, 3, batch_size=2).tokens == tokens_in_text - 1
    # The first token of every disjoint window has nothing before it.
    assert text_loss(model, text, 8, batch_size=2).tokens == tokens_in_text - math.ceil(tokens_in_text / 8)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_batches_change_nothing(text, batch_size):
    model = tiny.make_model("bloom")
    found = text_loss(model, text, 16, 5, batch_size)

    assert found.nll == pytest.approx(text_loss(model, text, 16, 5, 4).nll, rel=1e-6)


def test_a_model_in_training_mode_is_measured_in_eval_mode_and_put_back(text):
    model = tiny.make_model("opt_pre_norm", dropout=0.5)
    expected = text_loss(model, text, 16)
    model.train()

    assert text_loss(model, text, 16) == expected and model.training


def test_a_window_s_loss_is_its_mean():
    model = tiny.make_model("llama_gqa_biases")
    windows = torch.arange(40).view(2, 20)
    losses = window_losses(model, windows)

    assert losses[1] == pytest.approx(text_loss(model, windows[1], 20).loss, rel=1e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (0, 1)])
def test_windows_too_short_to_predict_anything_are_refused(shape):
    with pytest.raises(ValueError, match="seq_len >= 2"):
        perplexity(tiny.make_model("llama_gqa_biases"), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (1, {}, r"needs two tokens.*got \(1,\)"),
        (0, {}, r"needs two tokens.*got \(0,\)"),
        (20, {"max_length": 1}, "max_length must be at least 2"),
        (20, {"max_length": 8, "stride": 9}, "stride from 1 to max_length; got 8 and 9"),
        (20, {"max_length": 8, "stride": 0}, "stride from 1"),
        (20, {"max_length": 129}, "max_length=129 is more than the 128 positions"),
    ],
)
def test_texts_and_windows_that_cannot_be_are_refused(length, options, message):
    with pytest.raises(ValueError, match=message):
        text_loss(tiny.make_model("llama_gqa_biases"), torch.zeros(length, dtype=torch.int64), **options)


class TestMetric:
    """The module of `evaluate`, loaded from its file."""

    @pytest.fixture
    def metric(self, tmp_path):
        return evaluate.load(PERPLEXITY_METRIC, cache_dir=str(tmp_path))

    def test_texts_of_any_lengths_count_by_their_tokens(self, metric, tokenizer):
        model = tiny.make_model("llama_gqa_biases")
        texts = ["the quick brown fox", "the lazy dog jumps over the quick brown fox and the lazy dog " * 4]
        found = metric.compute(predictions=texts, model=model, tokenizer=tokenizer, max_length=16, stride=8)
        each = [plain_loop(model, torch.tensor(tokenizer(text)["input_ids"]), 16, 8) for text in texts]
        total = TextLoss(sum(nll for nll, _ in each), sum(count for _, count in each))

        assert found["tokens"] == total.tokens
        assert found["nll"] == pytest.approx(total.nll, rel=1e-4)
        assert found["perplexity"] == pytest.approx(total.perplexity, rel=1e-4)
        assert found["perplexities"] == pytest.approx([math.exp(nll / count) for nll, count in each], rel=1e-4)

    def test_a_pruned_checkpoint_is_loaded_by_name(self, metric, tokenizer, tokens, tmp_path):
        pruner = FwdPruner(tiny.make_model("opt_pre_norm"), tokenizer)
        model = pruner.prune(tiny.request(sparsity=0.4), tokens)
        pruner.save_pretrained(tmp_path / "pruned")
        texts = ["the quick brown fox jumps over the lazy dog"]
        by_name = metric.compute(predictions=texts, model=str(tmp_path / "pruned"))

        assert by_name == metric.compute(predictions=texts, model=model, tokenizer=tokenizer)

    def test_a_text_without_tokens_is_named(self, metric, tokenizer):
        with pytest.raises(ValueError, match="Text 1 has 0 tokens"):
            metric.compute(predictions=["the fox", ""], model=tiny.make_model("llama_mqa"), tokenizer=tokenizer)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_nothing_are_refused(text, batch_size):
    model = tiny.make_model("llama_mqa")
    with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {batch_size}"):
        text_loss(model, text, batch_size=batch_size)
    with pytest.raises(ValueError, match=f"batch_size must be at least 1; got {batch_size}"):
        window_losses(model, text[:64].view(2, 32), batch_size)
