"""Error messages of the Python interface, with its arguments replaced by the options of the command line."""

from __future__ import annotations

import ast
import re
from argparse import ArgumentParser


# A value as Python writes it: a list, a quoted string, or a word. A full stop after it ends the sentence.
_VALUE = r"\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[\w+-]+(?:\.\w+)*"

# Arguments that have other names in the commands that measure texts.
_OF_TEXTS = {"dataset_column": "text_column", "dataset_split": "text_split", "dataset_config": "text_config"}

# Not inside of a path, an option or a quoted name.
_START = r"(?<![\w\-/.`'\"])"


def in_options(message: str, parser: ArgumentParser) -> str:
    """Return an error message in which the arguments of Python are replaced by the options of a command.

    `sparsity=0.3` becomes `--sparsity 0.3`, `teacher=...` becomes `--teacher`, `overwrite=True` becomes `--overwrite`,
    and a bare name with an underscore, such as `seq_len`, becomes an option.

    Args:
        message (`str`): the message.
        parser (`ArgumentParser`): the command's parser; names that it has no option for stay as they are.
    """
    options = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    for name, other in _OF_TEXTS.items():
        if f"--{name}" not in options and f"--{other}" in options:
            message = re.sub(rf"{_START}{name}\b", other, message)

    def assigned(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        return _option(name, value, options) or match[0]

    message = re.sub(rf"{_START}(?P<name>[a-z]\w*)=(?P<value>{_VALUE})", assigned, message)

    def left_open(match: re.Match) -> str:
        return f"--{match['name']}" if f"--{match['name']}" in options else match[0]

    # "teacher=..." stands for any value.
    message = re.sub(rf"{_START}(?P<name>[a-z]\w*)=\.\.\.", left_open, message)
    # A message may name an option both ways, as in "--layout stock (--layout stock)".
    message = re.sub(r"(--[\w-]+(?: [\w-]+)?) \(\1\)", r"\1", message)
    if "--overwrite" in options:
        message = re.sub(rf"{_START}pass overwrite\b", "pass --overwrite", message)

    def named(match: re.Match) -> str:
        return f"--{match[0]}" if f"--{match[0]}" in options else match[0]

    # A name at the start of such a message is always an argument.
    message = re.sub(r"^[a-z]\w*(?= must | needs | is for )", named, message)
    return re.sub(rf"{_START}[a-z]+(?:_[a-z]+)+\b(?![=(/.]\w)", named, message)


def _option(name: str, value: str, options: set[str]) -> str | None:
    """Return the option that sets an argument of Python to this value; `None` where there is none."""
    if value in ("True", "False"):
        wanted = f"--{name}" if value == "True" else f"--no-{name}"
        return wanted if wanted in options else None
    if f"--{name}" not in options:
        return None
    if value == "None":
        return f"no --{name}"
    try:
        literal = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        literal = value
    items = literal if isinstance(literal, list) else [literal]
    return " ".join([f"--{name}", *map(str, items)])
