"""Measurements of one model or several: quality on texts and tasks, speed and size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.positions import check_length, positions_of
from .chats import MAX_LENGTH as LONGEST_CHAT
from .chats import ChatRows, chats_loss, open_texts_or_chats
from .comparison import Comparison, Evaluation
from .perplexity import MAX_LENGTH as LONGEST_WINDOW
from .perplexity import TextLoss, texts_loss
from .speed import benchmark
from .tasks import evaluate_tasks


# Options of [`benchmark`] that [`compare`] takes.
SPEED_OPTIONS = ("batch_sizes", "prompt_tokens", "new_tokens", "repeats")


@dataclass(frozen=True)
class QualityOptions:
    """How the quality of a model is measured.

    Args:
        max_length (`int`, *optional*): longest window of a text, see [`text_loss`], or longest chat, see
            [`chats_loss`].
        stride (`int`, *optional*): distance between the starts of windows of a text, likewise.
        batch_size (`int`, defaults to 4): windows, or requests of tasks, per forward pass.
        num_fewshot (`int`, *optional*): examples in the prompt of a task; by default the task's own number.
        limit (`int`, *optional*): number of rows of each task that are scored; by default all.
        apply_chat_template (`bool`, defaults to `False`): put the prompts of tasks through the tokenizer's chat
            template.
        seed (`int`, defaults to 0): seed of the choice of examples in the prompt.
        positions (`int`, *optional*): number of positions that windows fit into where `max_length` is not set; by
            default that of the model.
    """

    max_length: int | None = None
    stride: int | None = None
    batch_size: int = 4
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    seed: int = 0
    positions: int | None = None

    def of_tasks(self) -> dict[str, Any]:
        """Return the options of [`evaluate_tasks`]."""
        names = ("batch_size", "seed", "num_fewshot", "limit", "apply_chat_template")
        return {name: getattr(self, name) for name in names}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Iterable[Any]] | None = None,
    tasks: Sequence[str | Path] = (),
    name: str = "model",
    **options: Any,
) -> Evaluation:
    """Measure the quality of a model: perplexity of texts, and scores of tasks.

    Args:
        model (`PreTrainedModel`): a causal language model, dense or pruned.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        texts (mapping of `str` to strings or chats, *optional*): texts by name. The strings of a text are joined
            without a separator. Of chats, which may have any form that [`chats_loss`] takes, the answers are measured.
        tasks (sequence of `str` or `Path`, *optional*): see [`evaluate_tasks`].
        name (`str`, defaults to `"model"`): name of the model.
        options: fields of [`QualityOptions`], such as `max_length`, `batch_size` and `limit`.
    """
    quality = QualityOptions(**options)
    losses = {text: _loss_on(model, tokenizer, text, pieces, quality) for text, pieces in (texts or {}).items()}
    scores = evaluate_tasks(model, tokenizer, tasks, **quality.of_tasks()) if tasks else []
    return Evaluation(name, losses, scores)


def _loss_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, pieces: Any, options: QualityOptions
) -> TextLoss:
    """Return the loss of a model on strings that are one text, or on the answers of chats."""
    if isinstance(pieces, str):
        raise ValueError(f"The text {name!r} is a string; pass its strings in a list, such as [text].")

    def within(default: int) -> int | None:
        if options.max_length is not None or options.positions is None:
            return options.max_length
        return min(default, options.positions)

    if not isinstance(pieces, ChatRows):
        # Columns and tables are iterables of the names of their columns.
        holds_rows = isinstance(pieces, Mapping) or hasattr(pieces, "columns") or hasattr(pieces, "column_names")
        pieces = pieces if holds_rows else list(pieces)
        if holds_rows or not all(isinstance(piece, str) for piece in pieces):
            _, pieces = open_texts_or_chats(pieces)
    if isinstance(pieces, ChatRows):
        return chats_loss(model, tokenizer, pieces, within(LONGEST_CHAT), options.batch_size)
    return texts_loss(model, tokenizer, pieces, within(LONGEST_WINDOW), options.stride, options.batch_size)


def compare(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Iterable[Any]] | None = None,
    tasks: Sequence[str | Path] = (),
    **options: Any,
) -> Comparison:
    """Compare models: measure their size, speed, perplexity of texts and scores of tasks.

    Args:
        models (mapping of `str` to `PreTrainedModel`): models by name, of one vocabulary; speed-ups are relative to
            the first one.
        tokenizer (`PreTrainedTokenizerBase`): their tokenizer.
        texts (mapping of `str` to strings or chats, *optional*): see [`evaluate`]; not iterators, since every model
            reads them.
        tasks (sequence of `str` or `Path`, *optional*): likewise.
        options: `batch_sizes`, `prompt_tokens`, `new_tokens` and `repeats` of [`benchmark`], and fields of
            [`QualityOptions`].

    Raises:
        ValueError: where the vocabularies differ in size, so that perplexities cannot be compared.
    """
    sizes = {name: model.config.get_text_config().vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"The models have vocabularies of different sizes ({listed}), so that their perplexities cannot be "
            f"compared; compare models of one tokenizer."
        )
    speed = {name: options.pop(name) for name in SPEED_OPTIONS if name in options}
    # A misspelt option fails before anything is measured.
    quality = QualityOptions(**options)
    for model in models.values():
        check_length(quality.max_length or 0, model.config)
    # Figures of windows of different lengths could not be compared.
    known = [positions for model in models.values() if (positions := positions_of(model.config)) is not None]
    options.setdefault("positions", min(known, default=None))
    evaluations = []
    for (name, model), timed in zip(models.items(), benchmark(models, **speed)):
        measured = evaluate(model, tokenizer, texts, tasks, name, **options)
        evaluations.append(replace(measured, benchmark=timed))
    return Comparison(evaluations)
