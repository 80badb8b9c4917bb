"""The parser of a command: how its help is formatted, and the suggestions where a word is misspelt."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from optimum_fwdprune.request.fields import AUTO
from optimum_fwdprune.words import did_you_mean


WIDTH = 100


class HelpFormatter(RawDescriptionHelpFormatter):
    """Formats help at most `WIDTH` columns wide; one-line texts are wrapped, lists and examples stay as they are."""

    def __init__(self, prog: str):
        width = min(WIDTH, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=30, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = super()._fill_text if "\n" in text else super(RawDescriptionHelpFormatter, self)._fill_text
        return filled(text, width, indent)


class Parser(ArgumentParser):
    """Parses a command; an unknown option is an error that names the most similar one."""

    def __init__(self, **options: Any):
        super().__init__(**{**options, "formatter_class": HelpFormatter})

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse the words of a command line, after checking that all of its options are known."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in itertools.takewhile(lambda word: word != "--", args or ()):
            name = word.partition("=")[0]
            # Options may be abbreviated.
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                self.error(f"there is no option {name}.{did_you_mean(name, known)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage, the message, and how to get help, and exit with status 2."""
        self.exit(2, f"{self.format_usage()}error: {message}\n`{self.prog} --help` shows every option.\n")


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """Return a function that accepts one of `choices`; its error names the most similar one."""
    choices = list(choices)

    def parse(word: str) -> str:
        if word not in choices:
            raise ArgumentTypeError(f"{word!r} is not one of {', '.join(choices)}.{did_you_mean(word, choices)}")
        return word

    return parse


def number_or_auto(word: str) -> int | str:
    """Return the number that a word stands for, or `"auto"` as it is."""
    try:
        return AUTO if word == AUTO else int(word)
    except ValueError:
        raise ArgumentTypeError(f"{word!r} is neither a number nor {AUTO}.") from None


def choice(choices: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of `add_argument` for an option that takes one of `choices`."""
    choices = list(choices)
    return {"type": one_of(choices), "metavar": "{" + ",".join(choices) + "}"}


def listed(described: Mapping[str, str]) -> str:
    """Return a list of names with their descriptions, one below the other."""
    longest = max(map(len, described))
    texts = (textwrap.wrap(text, WIDTH - longest - 6) for text in described.values())
    gap = "\n" + " " * (longest + 2)
    # A description of one line would be wrapped.
    return "\n".join(f"{name:<{longest}}  {gap.join(lines)}" for name, lines in zip(described, texts)) + "\n "
