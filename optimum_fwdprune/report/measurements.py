"""Measurements on a model card: the section that people read, and the entries that the Hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..evaluation import Comparison
from ..files import write_text_atomically
from .training import dataset_of


HEADING = "## Measurements"

# The table is between these comments, so that it can be replaced without touching what else was written.
START, STOP = "<!-- measurements -->", "<!-- end of measurements -->"
TABLE = re.compile(rf"{START}.*?{STOP}", re.DOTALL)

# What follows the section on the cards of this package.
NEXT = ("## What each layer kept", "## Reproduce it", "## Limits")


def measurements_section(comparison: Comparison | None) -> str:
    """Return the section with the table of a comparison."""
    return f"{HEADING}\n\n{_table_of(comparison)}" if comparison else ""


def _table_of(comparison: Comparison) -> str:
    texts = comparison.evaluations[-1].texts
    measured = [f"{loss.tokens:,} predicted tokens of {name}" for name, loss in texts.items()]
    caption = f"\n\nPerplexity is that of {', and of '.join(measured)}." if measured else ""
    return f"{START}\n{comparison.to_markdown().rstrip()}{caption}\n{STOP}"


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


def checked_card(file: Path) -> Any:
    """Read a model card.

    Raises:
        ValueError: where it is no text in UTF-8, or the entries at its head are no YAML that the Hub reads.
    """
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=False)
        str(card)
    except Exception as error:  # The parser of YAML has errors of its own.
        raise ValueError(f"The model card {file} cannot be read: {' '.join(str(error).split())}.") from error
    return card


def write_measurements(file: Path, comparison: Comparison, earlier: Comparison | None = None) -> None:
    """Put measurements on a card that was written before, in the place of older ones; all else stays as it is.

    Args:
        file (`Path`): the card, which [`checked_card`] can read.
        comparison (`Comparison`): measurements, in which the model of the card is the last one.
        earlier (`Comparison`, *optional*): the measurements that are on the card.
    """
    card = checked_card(file)
    pipeline = card.data.get("pipeline_tag")
    new, old = (results_of(measured, pipeline) for measured in (comparison, earlier))
    replaced = {_measured_by(result) for result in (*new, *old)}
    others = [result for result in card.data.eval_results or [] if _measured_by(result) not in replaced]
    if new or old:
        card.data.eval_results = [*others, *new] or None
        name = card.data.get("model_name") or file.resolve().parent.name
        card.data.model_name = name if card.data.eval_results else None
    text = card.text.replace("\r\n", "\n")
    if TABLE.search(text):
        text = TABLE.sub(lambda _found: _table_of(comparison), text, count=1)
    else:
        lines = text.rstrip("\n").split("\n")
        place = _place_of_section(lines)
        section = [*measurements_section(comparison).split("\n"), ""]
        text = "\n".join([*lines[:place], *section, *lines[place:]]).rstrip("\n") + "\n"
    card.text = text
    write_text_atomically(file.resolve(), str(card))


def _measured_by(result: EvalResult) -> tuple[str, str | None, str]:
    return result.dataset_name, result.dataset_config, result.metric_type


def _place_of_section(lines: list[str]) -> int:
    """Return the number of the line before which the section is put: a heading outside of code, or the end."""
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.lstrip().startswith(("```", "~~~"))
        if not in_code and line.rstrip() in NEXT:
            return number
    lines.append("")
    return len(lines)
