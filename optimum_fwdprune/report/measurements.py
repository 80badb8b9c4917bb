"""Measurements on a model card: the section that people read, and the entries that the Hub reads."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..evaluation import Comparison
from ..files import write_text_atomically
from .training import dataset_of


HEADING = "## Measurements"

# What follows the section on the cards of this package.
NEXT = re.compile(r"^## (What each layer kept|Reproduce it|Limits)$", re.MULTILINE)


def measurements_section(comparison: Comparison | None) -> str:
    """Return the section with the table of a comparison."""
    return f"{HEADING}\n\n{comparison.to_markdown().rstrip()}" if comparison else ""


def results_of(comparison: Comparison | None, pipeline: str | None) -> list[EvalResult]:
    """Return the perplexities and scores of the last model of a comparison, as the Hub reads them.

    Args:
        comparison (`Comparison`, *optional*): measurements.
        pipeline (`str`, *optional*): the task that the model's page on the Hub shows.
    """
    figures = [
        (dataset, metric, value)
        for evaluation in (comparison.evaluations[-1:] if comparison else [])
        for dataset, metric, value in (
            *((text, "perplexity", loss.perplexity) for text, loss in evaluation.texts.items()),
            *((score.task, score.metric, score.value) for score in evaluation.tasks),
        )
    ]
    return [
        EvalResult(
            task_type=pipeline or "text-generation",
            dataset_type=dataset_of(dataset)[0],
            dataset_name=dataset,
            dataset_config=dataset_of(dataset)[1],
            metric_type=metric,
            metric_value=value,
        )
        for dataset, metric, value in figures
    ]


def write_measurements(file: Path, comparison: Comparison) -> None:
    """Put measurements on a card that was written before, in the place of older ones; all else stays as it is.

    Args:
        file (`Path`): the card.
        comparison (`Comparison`): measurements, in which the model of the card is the last one.
    """
    card = ModelCard.load(file)
    card.data.eval_results = results_of(comparison, card.data.get("pipeline_tag")) or None
    if card.data.eval_results:
        card.data.model_name = card.data.get("model_name") or file.resolve().parent.name
    section, text = measurements_section(comparison), card.text
    # A section ends where the next one of its level starts.
    old = re.search(rf"^{HEADING}$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    following = NEXT.search(text)
    if old is not None:
        start, stop = old.span()
    else:
        start = stop = len(text) if following is None else following.start()
    before, after = text[:start].rstrip("\n"), text[stop:].lstrip("\n")
    card.text = "\n\n".join(part for part in (before, section, after) if part).rstrip("\n") + "\n"
    write_text_atomically(file, str(card))
