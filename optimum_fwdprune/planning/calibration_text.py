"""The calibration text of a run, and what is announced of it: how much there is, and why."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.amount import Amount
from ..data.calibration import Calibration
from ..data.load_calibration import load_calibration
from ..data.sampling import Sampling, sample_from_model
from ..loading.state import evaluating
from ..request.config import PruningConfig
from ..runs.progress import announce
from ..runs.resume import Resume


class CalibrationText:
    """Loads the calibration tokens of a run, and announces every text once.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): required for calibration on text.
        dataset (*optional*): calibration data, which replaces that of the request.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, dataset: Any):
        self.dataset = dataset
        self._tokenizer = tokenizer
        self._announced: Calibration | None = None

    def load(self, config: PruningConfig, model: PreTrainedModel, resume: Resume | None, more: int) -> Calibration:
        """Return the calibration tokens of a request for a model, and `more` windows than it asks for; `resume` is the
        folder for the state of text that the model generates."""
        sample = partial(sample_from_model, resume=resume)
        with evaluating(model):
            calibration = load_calibration(config, model, self._tokenizer, self.dataset, sample, more)
        if calibration is not self._announced:
            announce(described_calibration(model, config, calibration))
        self._announced = calibration
        return calibration

    def read(self, config: PruningConfig, model: PreTrainedModel) -> Calibration:
        """Return the calibration tokens of a request for a model without weights. Text that the model would generate
        is replaced by as many tokens."""
        return load_calibration(config, model, self._tokenizer, self.dataset, _stand_in)


def described_calibration(model: PreTrainedModel, config: PruningConfig, calibration: Calibration) -> str:
    """Return a sentence on the number of calibration tokens, and why there are as many where this is the default.

    Args:
        model (`PreTrainedModel`): the dense model.
        config (`PruningConfig`): the request.
        calibration (`Calibration`): the tokens.
    """
    amount = Amount.of(config, model)
    why = amount.why() if len(calibration) >= amount.windows else ""
    windows = f"{len(calibration):,} windows of {calibration.input_ids.shape[1]:,} tokens"
    return f"Calibration uses {windows}, {calibration.num_tokens:,} tokens in all{why}."


def _stand_in(_model: Any, _tokenizer: Any, sampling: Sampling) -> torch.Tensor:
    return torch.zeros(sampling.n_samples, sampling.seq_len, dtype=torch.int64)
