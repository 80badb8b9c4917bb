"""How a pruned checkpoint is made again: the command, and what the command cannot name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..allocation.composing import EARLIER
from ..allocation.plan import PLAN_NAME
from ..data.texts import FILE_LOADERS
from ..request.config import PruningConfig
from ..request.options import Heading
from ..runs.loggers import LIBRARY
from .command import command_of
from .record import Record


# Key of a plan's metadata: what went into a pruning beside the request.
INPUTS = "inputs"

# Arguments of `from_pretrained` that decide which weights are read; the command line has options of these names.
LOADING = ("dtype", "revision", "tokenizer", "gguf_file", "attn_implementation", "trust_remote_code")


# Names of calibration data that was passed in memory.
IN_MEMORY = ("tokens", "strings", "rows", "dataset")


@dataclass(frozen=True)
class Reproduction:
    """How to prune a model once more in the same way.

    Args:
        command (`str`, *optional*): the command line; `None` where no command can do it, and the notes say why.
        notes (`list[str]`): sentences on what the command takes for granted.
    """

    command: str | None
    notes: list[str] = field(default_factory=list)


def inputs_of(loading: Mapping[str, Any] | None, dtype: Any, was_pruned: bool, data_in_memory: bool) -> dict[str, Any]:
    """Return the inputs of a pruning beside its request that a plan records, as JSON values.

    Args:
        loading (mapping, *optional*): arguments of `from_pretrained`; `None` for a model that was passed in memory.
        dtype (`torch.dtype`): of the model.
        was_pruned (`bool`): whether it was a pruned model already.
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
    """Return how a checkpoint is made again; `None` where its request is not known.

    Args:
        record (`Record`): of the checkpoint.
        calibration (`str`, *optional*): name of the calibration data.
        repository (`str`, *optional*): the dense model's on the Hub; by default the one that the plan names.
    """
    config = record.config
    if config is None:
        return None
    metadata = record.plan.metadata if record.plan else {}
    inputs = dict(metadata.get(INPUTS) or {})
    if metadata.get("replayed") and metadata.get(EARLIER):
        # The plan has all prunings together, so the command replays it on the dense model.
        inputs["was_pruned"] = False
    source = str(metadata.get("source") or "")
    repository = None if inputs.get("was_pruned") else repository or (source if "/" in source else None)
    about_the_model = list(_about_the_model(inputs, source, repository))
    if earlier := metadata.get(EARLIER):
        about_the_model.append(
            f"The model was pruned {len(earlier) + 1} times. `{PLAN_NAME}` is of the dense model, with what all of "
            f"them kept."
        )
    obstacles = list(_obstacles(record, inputs, calibration))
    if obstacles:
        return Reproduction(None, [*obstacles, *about_the_model])
    command = command_of(
        config,
        repository or "MODEL",
        plan=record.plan,
        calibration=calibration,
        loading=inputs.get("loading"),
    )
    return Reproduction(command, [*about_the_model, *_about_the_request(record, config, calibration)])


def _obstacles(record: Record, inputs: Mapping[str, Any], calibration: str | None) -> Iterator[str]:
    """Yield why no command makes the checkpoint."""
    config = record.config
    assert config is not None
    if calibration is not None and inputs.get("data_in_memory"):
        yield (
            "No command makes this checkpoint again: its calibration data was passed to `prune(dataset=...)` in "
            "Python."
        )
    if type(config).__module__.partition(".")[0] != LIBRARY:
        yield f"No command makes this checkpoint again: the method `{config.method}` is registered in Python."
    if record.scores is not None and not _same_scoring(config, record.scores.config):
        yield (
            "No command makes this checkpoint again: its scores were made by another request, and passed to "
            "`prune(scores=...)` in Python."
        )
    for name, default in type(config)().to_dict().items():
        if getattr(config, name, default) is None and default is not None:
            yield f"No command makes this checkpoint again: `{name}` was set to `None`, for which there is no option."


def _same_scoring(config: PruningConfig, scored: PruningConfig) -> bool:
    """Whether scores made for one request are those that the other would make."""
    if type(config) is not type(scored):
        return False
    shared = {declared.name for declared in dataclasses.fields(PruningConfig)}
    names = [
        declared.name
        for declared in dataclasses.fields(config)
        if declared.name not in shared or declared.metadata.get("group") == Heading.CALIBRATION
    ]
    return all(config.to_dict()[name] == scored.to_dict()[name] for name in [*names, "attention_unit"])


def _about_the_model(inputs: Mapping[str, Any], source: str, repository: str | None) -> Iterator[str]:
    if inputs.get("was_pruned"):
        yield "`MODEL` is the pruned model that this pruning started from."
    elif repository is None:
        yield f"`MODEL` is the dense model{f', here a folder named `{source}`' if source else ''}."
    if inputs.get("model_in_memory"):
        yield "The model was passed to `FwdPruner` in Python: `MODEL` must hold the weights that it had then."


def _about_the_request(record: Record, config: PruningConfig, calibration: str | None) -> Iterator[str]:
    plan = record.plan
    if plan is not None and plan.metadata.get("replayed"):
        yield f"`{PLAN_NAME}` lies in this checkpoint; run the command in its folder."
    elif config.target_speedup is not None:
        yield "`--target_speedup` measures how long layers take, so another run or machine may keep other units."
    if calibration is not None and Path(calibration).suffix in FILE_LOADERS:
        yield f"`{calibration}` is the file that it was calibrated on; name the path of your copy."
    if record.recovery:
        yield "The command makes the pruned model as it was before it was trained."
