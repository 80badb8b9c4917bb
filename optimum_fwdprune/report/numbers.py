"""Numbers of a report as text, and as HTML with the exact value and its path in the JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ..record.reproduction import IN_MEMORY


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


# The name of a mixture of sources, each with its share.
MIXTURE = r".+ \(\d+%\)(, .+ \(\d+%\))+"

# The formats that numbers are written in.
WAYS = {
    "count": lambda value: f"{value:,.0f}",
    "millions": lambda value: f"{value / 1e6:,.1f} M",
    "megabytes": lambda value: f"{value / 1e6:,.1f} MB",
    "percent": lambda value: f"{value:.1%}",
    "change": lambda value: f"{value:+.1%}".replace("-", "\N{MINUS SIGN}"),
    "times": lambda value: f"{value:.2f}\N{MULTIPLICATION SIGN}",
    "seconds": lambda value: f"{value:,.1f} s",
    "tiny": lambda value: f"{value:.1e}",
    "number": _rounded,
}


def shown_as(document: Mapping[str, Any], path: list[str | int], way: str, absent: str = "not measured") -> Markup:
    """Return an HTML element that shows the number at `path` of a document.

    Args:
        document (mapping): the report.
        path (list of `str` and `int`): keys and indices that lead to the number; where one of them is missing, or
            leads to `None`, there is no number.
        way (`str`): its format, a key of `WAYS`.
        absent (`str`): text to show where there is no number.
    """
    value: Any = document
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
    if value is None:
        return Markup('<span class="absent">{}</span>').format(absent)
    shown = '<data value="{}" data-at="{}" data-way="{}">{}</data>'
    return Markup(shown).format(json.dumps(value), json.dumps(path), way, written(value, way))


def written(value: float | str | None, way: str, absent: str = "not measured") -> str:
    """Return a number as text in the format `way`, a key of `WAYS`, or `absent` where there is none.

    A `str` is returned as it is: it stands for a number that JSON cannot hold, such as `nan`.
    """
    return absent if value is None else value if isinstance(value, str) else WAYS[way](value)


def figure_way(name: str) -> str:
    """Return the format of a figure of a comparison, a key of `WAYS`."""
    if name == "parameters" or name.startswith("MACs"):
        return "millions"
    return "megabytes" if name.endswith(", bytes") else "times" if name.endswith("times as fast") else "number"


def figure_label(name: str) -> str:
    """Return the name of a figure of a comparison without its unit, which is shown with the number."""
    return name.removesuffix(", bytes").replace(", times as fast", ", against dense")


def calibration_in_words(source: str) -> str:
    """Return a phrase for the calibration data of this name, which can follow "calibrated on"."""
    words = {
        "self": "text that the model generated",
        "builtin": "Python's documentation",
        "wikitext2": "WikiText-2",
        "c4": "C4",
    }
    if re.fullmatch(MIXTURE, source):
        parts = (part.rpartition(" ") for part in source.split(", "))
        return ", ".join(f"{calibration_in_words(name)} {share}" for name, _, share in parts)
    return words.get(source, "data that was passed in Python" if source in IN_MEMORY else source)


def is_quality(name: str) -> bool:
    """Whether a figure of a comparison is a perplexity."""
    return name.startswith("perplexity, ")


def is_speed(name: str) -> bool:
    """Whether a figure of a comparison is a speed-up over another model."""
    return name.endswith(", times as fast")


def headline(figures: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the names of the first perplexity and of the first speed-up among the figures of a model."""
    return next(filter(is_quality, figures), None), next(filter(is_speed, figures), None)
