"""Docstrings in Hugging Face's form, made readable for mkdocstrings, which reads Google's; loaded by mkdocs.yml.

Signatures show the default of an `option`, without its help text.
"""

import re

import griffe


ARGUMENT = re.compile(r"^(?P<name>\s+\*{0,2}[\w, ]+) \((?P<type>[^\n]*?)\):", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?(?P<path>[\w.]+)`\](?!\[)")


class HuggingFaceDocstrings(griffe.Extension):
    """Types without backquotes, asterisks and defaults, which the signature shows; references that are links."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = ARGUMENT.sub(lambda found: f"{found['name']} ({plain(found['type'])}):", obj.docstring.value)
            obj.docstring.value = REFERENCE.sub(link, text)
        for parameter in obj.parameters if obj.is_function else ():
            if isinstance(parameter.default, griffe.ExprCall) and str(parameter.default.function) == "option":
                parameter.default = parameter.default.arguments[0]


def plain(type_: str) -> str:
    """`` `str`, *optional*, defaults to `"5GB"` `` is ``str, optional``."""
    return re.sub(r", defaults to .*", "", type_).replace("`", "").replace("*optional*", "optional")


def link(found: re.Match) -> str:
    path, name = found["path"], found["path"].rpartition(".")[2]
    return f"[`{name}`][{path}]" if "." in path else f"`{name}`"
