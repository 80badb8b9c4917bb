"""Perplexity as a metric of the library `evaluate`; `evaluate.load(PERPLEXITY_METRIC)` reads this file, offline."""

import datasets
import evaluate

from optimum_fwdprune.evaluation.perplexity import TextLoss, text_loss
from optimum_fwdprune.loading.tokenizers import tokens_around


_DESCRIPTION = """
Perplexity of texts under a causal language model: exp of the mean negative log-likelihood of all their tokens. Every
token counts once, for any lengths, windows and batch size.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): texts, which are predicted independently.
    model (`PreTrainedModel` or str): a causal language model, dense or pruned, or its folder or repository.
    tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer; by default the one saved with the model.
    max_length (int, *optional*): longest window; by default 512, or the model's number of positions if smaller.
    stride (int, *optional*): tokens of text between the starts of two windows; by default windows do not overlap.
    batch_size (int): windows per forward pass, 4 by default.

Returns:
    perplexity (float): perplexity of all texts together, weighted by tokens.
    nll (float): sum of negative log-likelihoods in nats.
    tokens (int): number of predicted tokens.
    perplexities (list of float): perplexity of every text.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Perplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def _compute(self, predictions, model, tokenizer=None, max_length=None, stride=None, batch_size=4):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if tokenizer is None:
            source = model if isinstance(model, str) else model.config._name_or_path
            tokenizer = AutoTokenizer.from_pretrained(source)
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        start, _ = tokens_around(tokenizer)
        losses = []
        for number, text in enumerate(predictions):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(start) + len(ids) < 2 or not ids:
                raise ValueError(f"Text {number} has {len(ids)} tokens; a text needs two to predict one: {text!r}.")
            ids = torch.tensor(ids, dtype=torch.int64)
            losses.append(text_loss(model, ids, max_length, stride, batch_size, start))
        total = sum(losses, TextLoss(0.0, 0))
        return {
            "perplexity": total.perplexity,
            "nll": total.nll,
            "tokens": total.tokens,
            "perplexities": [loss.perplexity for loss in losses],
        }
