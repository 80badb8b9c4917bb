"""The training of a pruned model in its card: the commands that repeat it, its figures, and its datasets."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ..data.texts import FILE_LOADERS, PRESETS
from ..recovery.options import RecoveryOptions
from ..words import name_and_weight


# The keys of the record of a training that are no figures.
NO_FIGURES = ("earlier", "command")


def training_section(recovery: Mapping[str, Any]) -> str:
    """Return how a model was trained, with the commands that repeat it, and the figures of every stage.

    Args:
        recovery (mapping): the record of a training, with those before it under `"earlier"`.
    """
    stages = (*recovery.get("earlier", ()), recovery)
    if any("round" in stage for stage in stages):
        text = "After every round of the pruning, the model was trained:"
    else:
        commands = dict.fromkeys(_command(stage) for stage in stages)
        text = "After pruning, the model was trained:\n\n" + "\n\n".join(
            f"```bash\n{command}\n```"
            if command
            else "No command can repeat a training whose data, teacher or callbacks were passed in Python."
            for command in commands
        )
        if any(commands):
            text += "\n\n`PRUNED` is the model before this training."
    for stage in stages:
        text += "\n\n" + "\n".join(f"- {name}: {_written(value)}" for name, value in _figures_of(stage))
    return text


def datasets_of(recovery: Mapping[str, Any] | None) -> list[str]:
    """Return the datasets of the Hub that a model was trained on after its pruning, by their repositories."""
    stages = (*recovery.get("earlier", ()), recovery) if recovery else ()
    words = [word for stage in stages for word in (stage.get("command") or {}).get("data", ())]
    names = [name_and_weight(word)[0] for word in words]
    repositories = [PRESETS[name]["path"] if name in PRESETS else name for name in names]
    return list(dict.fromkeys(filter(_is_repository, repositories)))


def dataset_of(name: str) -> tuple[str, str | None]:
    """Return the repository on the Hub and the configuration of a text that was measured, by the name that it is
    reported under; the name itself where it is no dataset of the Hub."""
    if name in PRESETS:
        return PRESETS[name]["path"], PRESETS[name]["name"]
    return name if _is_repository(name) else name.lower().replace(" ", "-"), None


def _is_repository(name: str) -> bool:
    is_file = any(name.endswith(ending) for ending in FILE_LOADERS)
    return not is_file and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _command(stage: Mapping[str, Any]) -> str | None:
    """Return the command that repeats a stage of training; `None` where no command can."""
    recorded = stage.get("command")
    if recorded is None:
        return None
    words = ["optimum-cli", "fwdprune", "recover", "PRUNED", "OUTPUT", "--dataset", *recorded["data"]]
    own = {declared.name for declared in dataclasses.fields(RecoveryOptions)}
    others = []
    for argument in recorded["arguments"]:
        name, _, value = argument.partition("=")
        if name not in own:
            others.append(argument)
        elif value in ("True", "False"):
            words.append(f"--{'' if value == 'True' else 'no-'}{name}")
        else:
            words += [f"--{name}", *value.split(",")]
    return shlex.join([*words, "--set", *others] if others else words)


def _figures_of(recovery: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the figures of one stage of training, with those of all blocks in one."""
    for name, value in recovery.items():
        if name == "blocks":
            before, after = "held-out error before", "held-out error after"
            last, changed = value[-1], sum(block[after] is not None for block in value)
            yield "trained blocks", f"{changed} of {len(value)}"
            yield "held-out error after the last block", f"{last[before]} before, {last[after] or last[before]} after"
        elif name not in NO_FIGURES:
            yield name, value


def _written(value: Any) -> str:
    """Return a figure of a training as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(_written, value)) if isinstance(value, list) else str(value)
