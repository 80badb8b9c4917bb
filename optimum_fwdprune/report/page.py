"""A report as one HTML file that loads nothing from elsewhere, with a JSON file of the same figures beside it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import as_path, check_output_file, write_text_atomically
from ..runs.progress import progress
from .canvas import NO_MATPLOTLIB, PALETTE
from .document import kinds_of, models_of
from .figures import pictures_of, pictures_of_all
from .numbers import calibration_in_words, figure_label, figure_way, headline, is_quality, is_speed, shown_as


# The colours that replace those of `PALETTE` on a dark page.
DARK = {
    "ink": "#e8ebf1",
    "muted": "#9aa6b8",
    "grid": "#323a49",
    "track": "#303948",
    "attention": "#7aa5f7",
    "mlp": "#eb9a58",
    "expert": "#bd93e6",
    "removed": "#596476",
    "accent": "#43bfa3",
    "paper": "#12161e",
}


def write_page(document: Mapping[str, Any], file: str | Path, overwrite: bool = False) -> Path:
    """Write a report's page, and a JSON file of its figures beside it; each file appears whole or not at all.

    Args:
        document (mapping): the report, as [`document_of`] returns it.
        file (`str` or `Path`): file of the page, ending in .html; the JSON file has the same name, ending in .json.
        overwrite (`bool`, defaults to `False`): replace files that exist.

    Returns:
        `Path`: the JSON file.

    Raises:
        ValueError: where `file` does not end in .html.
        OSError: where a file exists, or cannot be written.
        ImportError: where matplotlib is not installed.
    """
    page, figures = check_page_file(file, overwrite)
    text = render_page(document)
    write_text_atomically(figures, to_json(document))
    write_text_atomically(page, text)
    return figures


def check_page_file(file: str | Path, overwrite: bool = False) -> tuple[Path, Path]:
    """Return the paths of a page and of its JSON file, after checking that both can be written.

    Raises:
        ImportError: where matplotlib is not installed.
        ValueError: where `file` does not end in .html.
        OSError: where one of them exists and `overwrite` is not set, or cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(NO_MATPLOTLIB)
    if as_path(file, "file").suffix not in (".html", ".htm"):
        raise ValueError(f"{file} must end in .html.")
    page = check_output_file(file, overwrite)
    return page, check_output_file(page.with_suffix(".json"), overwrite)


def to_json(document: Mapping[str, Any]) -> str:
    """Return a report as the text of its JSON file."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def render_page(document: Mapping[str, Any]) -> str:
    """Return the page of a report as HTML; it depends on `document` alone.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        kinds_of=kinds_of,
        shown=partial(shown_as, document),
        label=figure_label,
        way=figure_way,
        headline=headline,
        calibration_in_words=calibration_in_words,
        is_quality=is_quality,
        is_speed=is_speed,
    )
    files = resources.files(__package__)
    models = models_of(document)
    return environment.from_string((files / "page.html").read_text(encoding="utf-8")).render(
        document=document,
        models=models,
        together=pictures_of_all(document, models),
        pictures=[
            pictures_of(checkpoint, f"c{place}")
            for place, checkpoint in enumerate(progress(document["checkpoints"], "Drawing", unit="checkpoint"))
        ],
        style=(files / "page.css").read_text(encoding="utf-8"),
        light=PALETTE,
        dark=DARK,
    )
