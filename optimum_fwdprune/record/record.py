"""What a pruned checkpoint says of its pruning: the request, the plan, the scores, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..allocation.plan import PLAN_NAME, PruningPlan
from ..files import write_text_atomically
from ..request.choices import ReconstructionKind
from ..request.config import UNDECIDED_BY_PLANS
from ..request.files import CONFIG_NAME
from ..scoring.methods import PruningConfig
from ..scoring.scores import SCORES_NAME, Scores


OUTCOME_NAME = "fwdprune/outcome.json"


@dataclass(frozen=True)
class Record:
    """What is known of a pruning.

    Args:
        config (`PruningConfig`, *optional*): the request.
        plan (`PruningPlan`, *optional*): what was kept.
        scores (`Scores`, *optional*): of all units, with the history of what learned.
        outcome (`dict`): JSON values, each `None` or absent where it is not known: `report`, the sizes and checks of
            [`PruningReport`]; `comparison`, what [`Comparison`] measured; `recovery`, how it was trained afterwards.
    """

    config: PruningConfig | None
    plan: PruningPlan | None
    scores: Scores | None
    outcome: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write a file for each of them."""
        folder = Path(folder)
        if self.config is not None:
            self.config.save_pretrained(folder)
        if self.plan is not None:
            self.plan.save(folder / PLAN_NAME)
        if self.scores is not None:
            # Text that a model was calibrated on may be private, and checkpoints get shared.
            self.scores.save(folder / SCORES_NAME, tokens=False)
        if any(self.outcome.values()):
            write_text_atomically(folder / OUTCOME_NAME, json.dumps(self.outcome, indent=2) + "\n")

    @classmethod
    def of_checkpoint(cls, model_id: str | Path, **hub_kwargs) -> Record:
        """Read the record of a folder, or of a repository of the Hub; what is not there is `None`.

        Args:
            model_id (`str` or `Path`): folder or repository id.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like.
        """
        found = [
            cached_file(str(model_id), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            for name in (CONFIG_NAME, PLAN_NAME, SCORES_NAME, OUTCOME_NAME)
        ]
        config, plan, scores, outcome = (None if file is None else Path(file) for file in found)
        return cls(
            None if config is None else PruningConfig.from_pretrained(config.parent),
            None if plan is None else PruningPlan.load(plan),
            None if scores is None else Scores.load(scores),
            {} if outcome is None else _json_object(outcome),
        )


def command_of(
    config: PruningConfig,
    model: str = "MODEL",
    output: str = "OUTPUT",
    plan: PruningPlan | None = None,
    calibration: str | None = None,
    loading: Mapping[str, Any] | None = None,
) -> str:
    """Return the command line that makes this request of a model; of a plan that was replayed, one that replays it.

    Args:
        config (`PruningConfig`): the request.
        model (`str`, defaults to `"MODEL"`): folder or repository of the model.
        output (`str`, defaults to `"OUTPUT"`): folder to write.
        plan (`PruningPlan`, *optional*): what the request came to.
        calibration (`str`, *optional*): name of the calibration text that the request came to use.
        loading (mapping of `str` to `str` or `True`, *optional*): options of loading the model.
    """
    words = ["optimum-cli", "fwdprune", "prune", "-m", model, output]
    replays = plan is not None and plan.metadata.get("replayed")
    values = config.to_dict()
    if calibration is not None:
        values["calibration"] = calibration
    # What the command takes where an option is left out.
    defaults = type(config)().to_dict()
    if replays:
        words += ["--plan", PLAN_NAME]
        defaults = {name: value for name, value in defaults.items() if name in UNDECIDED_BY_PLANS}
        defaults["reconstruction"] = str(ReconstructionKind.NONE)
    else:
        words += _option("method", config.method)
    for name, default in defaults.items():
        if name not in ("method", "fwdprune_version") and values[name] not in (None, default):
            words += _option(name, values[name])
    for name, value in (loading or {}).items():
        words += _option(name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    """An option of the command line with its value."""
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # A value that begins with a dash would be taken for an option.
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(found).__name__}.")
    return found
