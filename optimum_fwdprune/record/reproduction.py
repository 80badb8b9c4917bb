"""How to reproduce a pruned checkpoint: the command, and notes on inputs that the command cannot contain."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..allocation.composing import EARLIER
from ..allocation.plan import PLAN_NAME
from ..data.texts import FILE_LOADERS
from ..request.config import PruningConfig
from ..request.fields import Heading
from ..runs.loggers import LIBRARY
from ..words import name_and_weight
from .command import command_of
from .record import Record


# The key of a plan's metadata for the inputs of a pruning besides the request.
INPUTS = "inputs"

# The key of these inputs for the training after every round: the sources of the data and the arguments by their names;
# `None` where Python passed what the command line cannot name.
TRAINED = "trained"

# Arguments of `from_pretrained` that determine which weights are read; the command line has options of the same names.
LOADING = ("dtype", "revision", "tokenizer", "gguf_file", "attn_implementation", "trust_remote_code")


# Names of calibration data that was passed in memory.
IN_MEMORY = ("tokens", "strings", "rows", "dataset")


@dataclass(frozen=True)
class Reproduction:
    """How to reproduce a pruning.

    Args:
        command (`str`, *optional*): the command line; `None` where no command can do it, for reasons in the notes.
        notes (`list[str]`): sentences on the inputs that the command requires.
    """

    command: str | None
    notes: list[str] = field(default_factory=list)


def inputs_of(loading: Mapping[str, Any] | None, dtype: Any, was_pruned: bool, data_in_memory: bool) -> dict[str, Any]:
    """Return the inputs of a pruning besides its request as JSON values, which the plan's metadata holds.

    Args:
        loading (mapping, *optional*): arguments of `from_pretrained`; `None` for a model that was passed in memory.
        dtype (`torch.dtype`): dtype of the model.
        was_pruned (`bool`): whether the model had been pruned before.
        data_in_memory (`bool`): whether the calibration data was passed in memory.
    """
    named = {"dtype": dtype} if loading is None else {name: loading[name] for name in LOADING if loading.get(name)}
    return {
        "model_in_memory": loading is None,
        "loading": {
            name: value if value is True else str(value).removeprefix("torch.")
            for name, value in named.items()
            if value != "auto"
        },
        "was_pruned": was_pruned,
        "data_in_memory": data_in_memory,
    }


def reproduction_of(
    record: Record, calibration: str | None = None, repository: str | None = None
) -> Reproduction | None:
    """Return how to reproduce a checkpoint; `None` where its request is not known.

    Args:
        record (`Record`): record of the checkpoint.
        calibration (`str`, *optional*): name of the calibration data.
        repository (`str`, *optional*): the dense model's repository on the Hub; by default that in the plan.
    """
    config = record.config
    if config is None:
        return None
    metadata = record.plan.metadata if record.plan else {}
    inputs = dict(metadata.get(INPUTS) or {})
    if metadata.get("replayed") and metadata.get(EARLIER):
        # The plan combines all prunings, so that the command replays it on the dense model.
        inputs["was_pruned"] = False
    source = str(metadata.get("source") or "")
    repository = None if inputs.get("was_pruned") else repository or (source if "/" in source else None)
    model_notes = list(_model_notes(inputs, source, repository))
    if earlier := metadata.get(EARLIER):
        model_notes.append(
            f"The model was pruned {len(earlier) + 1} times. `{PLAN_NAME}` combines all of them: it lists the units "
            f"of the dense model that are kept."
        )
    obstacles = list(_obstacles(record, inputs, calibration))
    if obstacles:
        return Reproduction(None, [*obstacles, *model_notes])
    command = command_of(
        config,
        repository or "MODEL",
        plan=record.plan,
        calibration=calibration,
        loading=inputs.get("loading"),
    )
    if trained := inputs.get(TRAINED):
        command += " " + shlex.join(["--recover", *trained["data"], "--recovery", *trained["arguments"]])
    return Reproduction(command, [*model_notes, *_request_notes(record, config, calibration)])


def _obstacles(record: Record, inputs: Mapping[str, Any], calibration: str | None) -> Iterator[str]:
    """Yield the reasons why no command can reproduce the checkpoint."""
    config = record.config
    assert config is not None
    if calibration is not None and inputs.get("data_in_memory"):
        yield (
            "No command can reproduce this checkpoint: its calibration data was passed to `prune(dataset=...)` in "
            "Python."
        )
    if TRAINED in inputs and inputs[TRAINED] is None:
        yield (
            "No command can reproduce this checkpoint: the data of its training, a teacher or callbacks were passed "
            "to `prune_and_recover` in Python."
        )
    if type(config).__module__.partition(".")[0] != LIBRARY:
        yield f"No command can reproduce this checkpoint: the method `{config.method}` was registered in Python."
    if record.scores is not None and not _same_scoring(config, record.scores.config):
        yield (
            "No command can reproduce this checkpoint: its scores were made with another request, and passed to "
            "`prune(scores=...)` in Python."
        )
    for name, default in type(config)().to_dict().items():
        if getattr(config, name, default) is None and default is not None:
            yield (
                f"No command can reproduce this checkpoint: `{name}` was set to `None`, which no option of the "
                f"command line can do."
            )


def _same_scoring(config: PruningConfig, scored: PruningConfig) -> bool:
    """Return whether two requests would lead to the same scores."""
    if type(config) is not type(scored):
        return False
    shared = {declared.name for declared in dataclasses.fields(PruningConfig)}
    names = [
        declared.name
        for declared in dataclasses.fields(config)
        if declared.name not in shared or declared.metadata.get("group") == Heading.CALIBRATION
    ]
    return all(config.to_dict()[name] == scored.to_dict()[name] for name in [*names, "attention_unit"])


def _model_notes(inputs: Mapping[str, Any], source: str, repository: str | None) -> Iterator[str]:
    if inputs.get("was_pruned"):
        yield "`MODEL` is the pruned model that this pruning started from."
    elif repository is None:
        yield f"`MODEL` is the dense model{f', here a folder named `{source}`' if source else ''}."
    if inputs.get("model_in_memory"):
        yield "The model was passed to `FwdPruner` in Python: `MODEL` must have the weights that it had then."


def _request_notes(record: Record, config: PruningConfig, calibration: str | None) -> Iterator[str]:
    plan = record.plan
    if plan is not None and plan.metadata.get("replayed"):
        yield f"`{PLAN_NAME}` is a file of this checkpoint; run the command in its folder."
    elif config.target_speedup is not None:
        yield "`--target_speedup` measures latencies of layers, so another run or machine may keep other units."
    if calibration is not None:
        sources = config.calibration if isinstance(config.calibration, list) else [calibration]
        for source in sources:
            name, _ = name_and_weight(source)
            if Path(name).suffix in FILE_LOADERS:
                yield f"`{name}` is a file that the model was calibrated on; replace it by the path of your copy."
    if record.recovery and not (plan is not None and (plan.metadata.get(INPUTS) or {}).get(TRAINED)):
        yield "The command reproduces the pruned model before training."
