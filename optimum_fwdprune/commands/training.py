"""The data and the arguments of a training, as the commands read them from their options."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from optimum_fwdprune.recovery import RecoveryArguments

# The help of options that take sources of training data.
SOURCES = (
    "a .txt, .json, .jsonl or .parquet file, wikitext2, c4, builtin (Python's documentation), self (text that the "
    "teacher writes), or a dataset of the Hub. Its rows are text, chat messages, or questions with answers. Several "
    "are mixed by their weights: wikitext2 chats.jsonl:0.5."
)


def data_of(sources: list[str], option: str) -> Any:
    """Return the training data that an option names: a source, or a mixture of several.

    Raises:
        ValueError: where one of several is no name of a source.
    """
    if len(sources) == 1:
        return sources[0]

    from optimum_fwdprune.data.mixtures import Mixture

    try:
        return Mixture.of_names(sources)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error


def training_folder(output: str, named: str | None, option: str) -> str:
    """Return the folder of the Trainer's checkpoints, outside of OUTPUT, which stays empty until the end.

    Args:
        output (`str`): the folder of the checkpoint that the command writes.
        named (`str`, *optional*): the folder that the user named; by default `OUTPUT-training`.
        option (`str`): the option that names it.
    """
    folder = Path(named or f"{output.rstrip('/')}-training")
    if Path(output).resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"{option} {folder} lies in {output}, which must be empty until the trained model is saved to it; name a "
            f"folder outside of it."
        )
    return str(folder)


def named_values(pairs: list[str], option: str) -> dict[str, str]:
    """Return values by name from words such as `weight_decay=0.1`.

    Raises:
        ValueError: where a word has another form.
    """
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{option} takes NAME=VALUE; got {pair!r}.")
        values[name] = value
    return values


def training_arguments(values: Mapping[str, Any], folder: str, option: str) -> RecoveryArguments:
    """Return the arguments of a training, as the Trainer's own parser reads them.

    Args:
        values (mapping of `str` to `str` or `list`): arguments by name.
        folder (`str`): the folder of the Trainer's checkpoints.
        option (`str`): the option that takes any argument, for error messages.

    Raises:
        ValueError: on a name or a value that is no argument; the message names it.
    """
    from transformers import HfArgumentParser, IntervalStrategy

    from optimum_fwdprune.recovery import RecoveryArguments
    from optimum_fwdprune.words import did_you_mean

    known = set(RecoveryArguments.__dataclass_fields__)
    words = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"{option} takes arguments of transformers.TrainingArguments, which has no {name!r}."
                f"{did_you_mean(name, known)}"
            )
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    parser: Any = HfArgumentParser(RecoveryArguments, exit_on_error=False)  # type: ignore[arg-type]
    try:
        (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", folder, *words])
    except ArgumentError as error:
        # The message alone: argparse would add the usage of every training argument.
        raise ValueError(str(error)) from error
    strategy = IntervalStrategy(parsed.eval_strategy)
    if strategy != IntervalStrategy.NO and parsed.held_out is None:
        raise ValueError(
            f"{option} eval_strategy={strategy.value} needs data to evaluate on: set held_out to a share of the data, "
            f"such as 0.05, or pass eval_dataset in Python."
        )
    return parsed
