"""Writes docs/reference/options.md, the options of every method's request, from the fields themselves.

python benchmarks/options.py
"""

import dataclasses
from pathlib import Path

import pages

from optimum_fwdprune.scoring.methods import (
    PruningConfig,
    get_method,
    get_preset,
    registered_methods,
    registered_presets,
)


PAGE = Path(__file__).parent.parent / "docs" / "reference" / "options.md"
INTRODUCTION = """# Options of a request

Written by `benchmarks/options.py` from the fields of `PruningConfig`. Each is a keyword in Python, `sparsity=0.3`,
and an option on the command line, `--sparsity 0.3`; lists are values one after the other, `--kinds attention mlp`.

<div class="stacked" markdown>
"""


def files():
    """The page, by its path."""
    return {PAGE: page()}


def page():
    """The whole page, as Markdown."""
    shared = {field.name: field for field in dataclasses.fields(PruningConfig)}
    parts = [INTRODUCTION, "## Of every method\n", table(shared.values())]
    for name in registered_methods():
        own = [field for field in dataclasses.fields(get_method(name).config_class) if differs(field, shared)]
        if own:
            parts += [f"## Of `{name}`\n", table(own)]
    parts.append("## Presets\n")
    parts.append(
        "| preset | what it does | options |\n|---|---|---|\n" + "".join(map(preset_row, registered_presets()))
    )
    parts.append("</div>\n")
    return "\n".join(parts)


def differs(field, shared):
    return field.name != "method" and (field.name not in shared or default_of(field) != default_of(shared[field.name]))


def table(fields):
    rows = []
    for field in fields:
        choices = field.metadata.get("choices")
        allowed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        help = field.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{default_of(field)}` | {help}{allowed} |\n")
    return "| option | default | meaning |\n|---|---|---|\n" + "".join(rows)


def default_of(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def preset_row(name):
    preset = get_preset(name)
    fields = ", ".join(f"`{key}={value!r}`" for key, value in preset.fields.items())
    return f"| `{name}` | {preset.help} | {fields} |\n"


if __name__ == "__main__":
    pages.write(files())
