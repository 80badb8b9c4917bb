"""Words and tables: names as they may be shown, what was likely meant, and rows as text or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


# The least likeness of two names of which one is taken for a misspelling of the other.
NEAR = 0.75


def public_name(name_or_path: str) -> str:
    """Return a Hub repository as it is, a file or folder by its last part, also where it is gone: checkpoints get
    shared, home directories do not."""
    path = Path(name_or_path)
    return path.name if is_no_repository(name_or_path) or path.exists() else name_or_path


def is_no_repository(name_or_path: str) -> bool:
    """Whether a name can only be that of a file or folder; a repository of the Hub is `name` or `owner/name`."""
    path = Path(name_or_path)
    return path.is_absolute() or name_or_path.startswith((".", "~")) or "\\" in name_or_path or len(path.parts) > 2


def first_difference(found: Any, expected: Any, name: str = "content") -> str | None:
    """Say where two JSON values differ first, or return `None` where they are equal."""
    if isinstance(found, dict) and isinstance(expected, dict):
        differences = (first_difference(found.get(key), expected.get(key), key) for key in {**expected, **found})
        return next((difference for difference in differences if difference), None)
    return None if found == expected else f"its {name} is {found!r}, this one's is {expected!r}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a sentence, with a space before it, that names the nearest of `words`, or nothing where none is near.

    Near are words of nearly the same letters, and those that the word is a part of, as `speedup` is of
    `target_speedup`.
    """
    import difflib

    def plain(name: str) -> str:
        # Underscores and dashes, and either case, mean the same to whoever types them.
        return name.lower().replace("-", "_").strip("_")

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, plain(word), plain(name)).ratio()

    near = [
        name
        for name in words
        if likeness(name) >= NEAR
        or sorted(plain(name)) == sorted(plain(word))
        or (len(plain(word)) > 3 and plain(word) in plain(name).split("_"))
    ]
    return f" Did you mean {max(near, key=likeness)}?" if near else ""


def render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as a table of plain text: the same on a terminal, in a file, in a notebook and in a test."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        # What does not fit is broken and not cut: the ends of names are what tells them apart.
        table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    output = io.StringIO()
    # In a notebook rich writes to the notebook, and where FORCE_COLOR is set it writes escape codes.
    plain: dict[str, Any] = {"force_jupyter": False, "force_terminal": False, "color_system": None}
    Console(file=output, width=110, legacy_windows=False, **plain).print(table)
    return output.getvalue().rstrip("\n")


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of text as an HTML table, which notebooks show."""
    from html import escape

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"
