"""The declaration of a family to start from, as the text of a Python file."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, fields
from typing import Any

import transformers
from transformers import PreTrainedModel

from .recognition import RecognisedLayout


# Tasks that pruned classes are declared for: the ends of the names of Auto classes.
_TASKS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

# Longest line of the file.
LINE = 110


def declaration_of(model: PreTrainedModel, layout: RecognisedLayout) -> str:
    """Return a Python file that declares and registers the family of `model`.

    Args:
        model (`PreTrainedModel`): a dense model of the family.
        layout (`RecognisedLayout`): what its decoder layers were recognised to be.
    """
    config: Any = model.config
    config_class = type(config)
    prefix = config_class.__name__.removesuffix("Config")
    classes = _stock_classes(model)
    names: dict[str, set[str]] = {}
    for stock_class in (config_class, *classes.values()):
        names.setdefault(stock_class.__module__, set()).add(stock_class.__name__)
    pruned = [
        f"class Pruned{prefix}{task}(Pruned{prefix}Mixin, {stock_class.__name__}):\n    pass"
        for task, stock_class in classes.items()
    ]
    notes = "\n".join(textwrap.fill(note, LINE, initial_indent="- ", subsequent_indent="  ") for note in layout.notes)
    return _FILE.format(
        prefix=prefix,
        model_type=config.model_type,
        notes=f"\n\nWhat was guessed, or is to be looked at:\n\n{notes}\n" if notes else "",
        imports="\n".join(_import(module, sorted(names[module])) for module in sorted(names)),
        width=_width(config, layout),
        layout=textwrap.indent(_layout(layout), "    "),
        classes="\n\n\n".join(pruned),
    )


_FILE = '''\
"""{prefix} with per-layer sizes.{notes}"""

import sys

from huggingface_hub.dataclasses import strict
{imports}

from optimum_fwdprune import Architecture, AttentionLayout, DecoderLayout, MLPLayout, register_architecture
from optimum_fwdprune.models.per_layer import PerLayerConfigMixin, PerLayerMixin


@strict
class Pruned{prefix}Config(PerLayerConfigMixin, {prefix}Config):
    model_type = "pruned_{model_type}"
{width}

class Pruned{prefix}Mixin(PerLayerMixin):
    config_class = Pruned{prefix}Config
{layout}


{classes}


register_architecture(Architecture.from_module(sys.modules[__name__]))
'''


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return line if len(line) < LINE else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"


def _stock_classes(model: PreTrainedModel) -> dict[str, type]:
    """Return the stock classes of the family of `model` by task; those of other modelling files are left out."""
    module = type(model).__module__
    classes: dict[str, type] = {}
    for task in _TASKS:
        auto_class: Any = getattr(transformers, f"AutoModel{task.removeprefix('Model')}")
        stock = auto_class._model_mapping.get(type(model.config), None)
        if isinstance(stock, type) and stock.__module__ == module:
            classes[task] = stock
    # The code of a repository registers nothing.
    return classes or {"Model": type(model.base_model), "ForCausalLM": type(model)}


def _width(config: Any, layout: RecognisedLayout) -> str:
    """Return the lines that give the pruned config a number of channels, where the stock config has none."""
    key, values = layout.mlp.width_key, config.to_dict()
    if values.get(key) == layout.width:
        return ""
    times, rest = divmod(layout.width, config.hidden_size)
    width = str(layout.width) if rest else f"{times} * self.hidden_size"
    declared = "" if key in values else f"\n    {key}: int | None = None\n"
    return (
        f"{declared}\n    def __post_init__(self, **kwargs):\n        if self.{key} is None:\n"
        f"            self.{key} = {width}\n        super().__post_init__(**kwargs)\n"
    )


def _layout(layout: RecognisedLayout) -> str:
    """Return the statement that sets the layout."""
    parts = [f"{_call(layout.attention)},", f"{_call(layout.mlp)},"]
    if layout.layers != "layers":
        parts.append(f"layers={layout.layers!r},".replace("'", '"'))
    if layout.attributes:
        entries = "".join(f'    "{name}": {expression},\n' for name, expression in layout.attributes.items())
        parts.append(f"attributes=lambda config: {{\n{entries}}},")
    parts += [f"{name}={expression}," for name, expression in layout.options.items()]
    if layout.whole:
        parts.append(f"whole={_text(layout.whole)},")
    return f"layout = DecoderLayout(\n{textwrap.indent(chr(10).join(parts), '    ')}\n)"


def _call(part: Any) -> str:
    """Return the call that makes a part of a layout, with the arguments that are not their defaults."""
    arguments = [
        f"{field.name}={_text(getattr(part, field.name))}"
        for field in fields(part)
        if field.default is MISSING or getattr(part, field.name) != field.default
    ]
    return f"{type(part).__name__}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def _text(value: Any) -> str:
    return repr(value).replace("'", '"')
