"""What a sweep measures of every model: loss and divergence from the dense model, size, and speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.positions import positions_of
from ..architectures.sizes import ModelSizes
from ..data.calibration import Calibration
from ..evaluation import Benchmark, Comparison, Evaluation, TextLoss, benchmark
from ..evaluation.perplexity import MAX_LENGTH
from ..forward.reference import Likeness, Reference
from ..loading.tokenizers import starting_tokens
from .result import DIVERGENCE


# The name of the text that is held out of the calibration data.
HELD_OUT = "held-out text"


@dataclass(frozen=True)
class Measures:
    """What a sweep measures.

    Args:
        texts (mapping of `str` to iterable of `str`): texts by name, whose strings are joined without a separator; by
            default, windows of the calibration data that are not calibrated on.
        max_length (`int`, *optional*): tokens per window of a text; by default 512, or the model's number of positions
            if that is smaller.
        speed (`bool`, defaults to `True`): whether prefill and decoding are timed, in turns with the dense model.
        batch_sizes (sequence of `int`, defaults to `(1,)`): numbers of prompts to time.
        prompt_tokens (sequence of `int`, defaults to `(512,)`): lengths of the prompts to time.
        new_tokens (`int`, defaults to 16): decoding steps after each prefill.
        repeats (`int`, defaults to 5): timed runs, whose median is reported.
    """

    texts: Mapping[str, Iterable[str]] = field(default_factory=dict)
    max_length: int | None = None
    speed: bool = True
    batch_sizes: Sequence[int] = (1,)
    prompt_tokens: Sequence[int] = (512,)
    new_tokens: int = 16
    repeats: int = 5

    def windows_of_texts(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
    ) -> dict[str, list[Calibration]]:
        """Return the tokens of every text, cut into windows; the last window may be shorter.

        Raises:
            ValueError: where there is no tokenizer, a text is too short, or windows are too long for the model.
        """
        longest = positions_of(model.config)
        length = min(MAX_LENGTH, longest or MAX_LENGTH) if self.max_length is None else self.max_length
        if length < 2 or (longest is not None and length > longest):
            raise ValueError(f"max_length must be from 2 to the {longest} positions of the model; got {length}.")
        if self.texts and tokenizer is None:
            raise ValueError("Measuring on texts needs a tokenizer: FwdPruner(model, tokenizer).")
        windows = {}
        for name, pieces in self.texts.items():
            assert tokenizer is not None
            start = torch.tensor(starting_tokens(tokenizer, length), dtype=torch.int64)
            tokenized = tokenizer("".join(pieces), add_special_tokens=False, verbose=False)["input_ids"]
            ids, of_text = torch.tensor(tokenized, dtype=torch.int64), length - len(start)
            if not len(ids) or len(start) + len(ids) < 2:
                raise ValueError(f"The text {name!r} has {len(ids)} tokens, which is too few to predict one.")
            full = len(ids) // of_text * of_text
            parts = [ids[:full].view(-1, of_text)] if full else []
            if len(ids) > full and len(start) + len(ids) - full > 1:
                parts.append(ids[full:][None])
            parts = [torch.cat([start.expand(len(part), -1), part], dim=1) for part in parts]
            windows[name] = [Calibration(part, source=name) for part in parts]
        return windows

    def check_speed(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` where the prompts to time are too long for the model, or a number is out of range."""
        if not self.speed:
            return
        if min(*self.batch_sizes, *self.prompt_tokens, self.new_tokens, self.repeats) < 1:
            raise ValueError("batch_sizes, prompt_tokens, new_tokens and repeats must be at least 1.")
        longest = positions_of(model.config)
        if longest is not None and max(self.prompt_tokens) + self.new_tokens > longest:
            raise ValueError(
                f"{max(self.prompt_tokens)} prompt tokens and {self.new_tokens} new ones are more than the {longest} "
                f"positions of the model; lower prompt_tokens or new_tokens, or set speed=False."
            )

    def identity(self, windows: Mapping[str, Sequence[Calibration]]) -> dict[str, Any]:
        """Return what was measured as JSON values."""
        names = ("batch_sizes", "prompt_tokens", "new_tokens", "repeats") if self.speed else ()
        timed = {name: getattr(self, name) for name in names}
        timed |= {name: list(value) for name, value in timed.items() if isinstance(value, Sequence)}
        texts = {name: [part.fingerprint for part in parts] for name, parts in windows.items()}
        return {"texts": texts, "speed": timed or None}


class Meter:
    """Measures models against the dense one, which runs once for all of them.

    Args:
        model (`PreTrainedModel`): the dense model.
        windows (mapping of `str` to sequence of `Calibration`): the tokens of every text.
        measures (`Measures`): what is measured.
        batch_size (`int`): windows per forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Mapping[str, Sequence[Calibration]],
        measures: Measures,
        batch_size: int,
    ):
        self._model, self._measures = model, measures
        self._references = {name: Reference(model, parts, batch_size) for name, parts in windows.items()}
        losses = {name: _loss(reference.dense) for name, reference in self._references.items()}
        self._dense = Evaluation("dense", losses, [])

    def dense_figures(self) -> dict[str, float]:
        """Return the figures of the dense model that do not depend on the machine's load."""
        return _sizes(self._model) | _known(self._dense.figures())

    def measure(self, name: str, model: PreTrainedModel) -> tuple[dict[str, float], Comparison]:
        """Return the figures of a model, and its comparison with the dense model.

        Args:
            name (`str`): name of the model.
            model (`PreTrainedModel`): the model.
        """
        likenesses = {text: reference.compare(model) for text, reference in self._references.items()}
        own = Evaluation(name, {text: _loss(likeness) for text, likeness in likenesses.items()}, [])
        dense = self._dense
        if self._measures.speed:
            before, after = self._timed(name, model)
            dense, own = replace(dense, benchmark=before), replace(own, benchmark=after)
        divergences = {f"{DIVERGENCE}{text}": likeness.divergence for text, likeness in likenesses.items()}
        figures = _sizes(model) | _known(own.figures(dense)) | divergences
        return figures, Comparison([dense, own])

    def _timed(self, name: str, model: PreTrainedModel) -> list[Benchmark]:
        measures = self._measures
        return benchmark(
            {self._dense.name: self._model, name: model},
            batch_sizes=measures.batch_sizes,
            prompt_tokens=measures.prompt_tokens,
            new_tokens=measures.new_tokens,
            repeats=measures.repeats,
        )


def _loss(likeness: Likeness) -> TextLoss:
    return TextLoss(likeness.nll, likeness.tokens)


def _sizes(model: PreTrainedModel) -> dict[str, float]:
    sizes = ModelSizes.of(model)
    return {"parameters": sizes.parameters, "weights, bytes": sizes.bytes}


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
