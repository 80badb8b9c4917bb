"""Words and tables: names without local paths, suggestions for misspelt words, and tables as text or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


# Two names with at least this similarity count as misspellings of each other.
NEAR = 0.75


def public_name(name_or_path: str) -> str:
    """Return the name of a Hub repository, or the last part of a local path, also if the path no longer exists.

    Checkpoints are shared, and must not reveal paths of this machine.
    """
    path = Path(name_or_path)
    return path.name if is_no_repository(name_or_path) or path.exists() else name_or_path


def name_and_weight(source: str) -> tuple[str, float | None]:
    """Return the parts of a name such as `chats.jsonl:0.5`; the weight is `None` where there is none."""
    name, _, weight = source.rpartition(":")
    return (name, float(weight)) if name and re.fullmatch(r"\d+(\.\d+)?", weight) else (source, None)


def is_no_repository(name_or_path: str) -> bool:
    """Return whether a name can only be a local path; a repository of the Hub is `name` or `owner/name`."""
    path = Path(name_or_path)
    return path.is_absolute() or name_or_path.startswith((".", "~")) or "\\" in name_or_path or len(path.parts) > 2


def first_difference(stored: Any, expected: Any, name: str = "content") -> str | None:
    """Return a clause on the first difference of two JSON values; `None` where they are equal."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        for key in {**expected, **stored}:
            # No value is the same as none.
            if stored.get(key) == expected.get(key):
                continue
            if key not in stored:
                return f"it has no {key}, and this one has"
            if key not in expected:
                return f"it has {key}, and this one has not"
            if difference := first_difference(stored[key], expected[key], key):
                return difference
        return None
    return None if stored == expected else f"its {name} is {stored!r}, this one's is {expected!r}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a sentence, with a space before it, that names the most similar of `words`; an empty string if none is.

    Words are similar if they have nearly the same letters, or if the word is a part of them, as `speedup` is of
    `target_speedup`.
    """
    import difflib

    def plain(name: str) -> str:
        # Underscores and dashes, and upper and lower case, are treated alike.
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
    """Return rows of text as a table of plain text, which does not depend on the kind of output."""
    import io
    import random

    # The first import of rich draws a random number, which must not change the numbers that the caller draws.
    state = random.getstate()
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    random.setstate(state)
    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        # Long names are wrapped and not cut, since they often differ at their ends only.
        table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    output = io.StringIO()
    # By default rich writes to the notebook if there is one, and escape codes if FORCE_COLOR is set.
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
