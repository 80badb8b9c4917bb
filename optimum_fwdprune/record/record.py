"""The record of a pruning: the request, the plan, the scores, and the results."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..allocation.plan import PLAN_NAME, PruningPlan
from ..architectures import find_sites
from ..architectures.sizes import ModelSizes
from ..evaluation import Comparison
from ..files import write_text_atomically
from ..request.files import CONFIG_NAME
from ..scoring.methods import PruningConfig
from ..scoring.scores import SCORES_NAME, Scores
from .outcome import Outcome


OUTCOME_NAME = "fwdprune/outcome.json"


@dataclass(frozen=True)
class Record:
    """The record of a pruning; a field is `None` where nothing is known.

    Args:
        config (`PruningConfig`, *optional*): the request.
        plan (`PruningPlan`, *optional*): the units that were kept.
        scores (`Scores`, *optional*): the scores of all units, with the history of a method that learns.
        outcome (`Outcome`, *optional*): sizes before and after, the check of the result, and times.
        recovery (`dict`, *optional*): how the model was trained afterwards, as JSON values.
        comparison (`Comparison`, *optional*): measurements, in which this model is the last one.
    """

    config: PruningConfig | None = None
    plan: PruningPlan | None = None
    scores: Scores | None = None
    outcome: Outcome | None = None
    recovery: dict[str, Any] | None = None
    comparison: Comparison | None = None

    def plan_of(self, model: PreTrainedModel) -> PruningPlan | None:
        """Return the plan if it fits `model`; `None` where there is no plan, or it belongs to another model."""
        try:
            if self.plan is not None:
                self.plan.check_left(find_sites(model, self.plan.attention_unit))
        except ValueError:
            return None
        return self.plan

    def leave_with(self, model: PreTrainedModel) -> Record:
        """Attach the record to `model`, whose `save_pretrained` then writes it, and return the attached record.

        Pruned classes write it themselves, and a model of a stock class gets a method for it.

        Its sizes are updated to those of `model`, since training may have changed the dtype.
        """
        record = self
        if self.outcome is not None:
            now = ModelSizes.of(model)
            outcome = replace(self.outcome, parameters_after=now.parameters, bytes_after=now.bytes)
            record = replace(self, outcome=outcome)
        vars(model)["pruning_record"] = record
        if not hasattr(type(model), "pruning_record"):
            # A bound method follows copies of the model.
            vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
        return record

    def save(self, folder: str | Path) -> None:
        """Write the record as files of a checkpoint."""
        folder = Path(folder)
        if self.config is not None:
            self.config.save_pretrained(folder)
        if self.plan is not None:
            self.plan.save(folder / PLAN_NAME)
        if self.scores is not None:
            # The calibration text may be private, and checkpoints are shared.
            self.scores.save(folder / SCORES_NAME, tokens=False)
        self.save_figures(folder)

    def save_figures(self, folder: Path) -> None:
        """Write sizes, measurements and the training as a file of a checkpoint."""
        values = {
            "report": None if self.outcome is None else self.outcome.to_dict(),
            "comparison": None if self.comparison is None else self.comparison.without_folders().to_list(),
            "recovery": self.recovery,
        }
        if any(values.values()):
            write_text_atomically(folder / OUTCOME_NAME, json.dumps(values, indent=2) + "\n")

    @classmethod
    def of_checkpoint(cls, model_id: str | Path, **hub_kwargs) -> Record:
        """Read the record in a folder or in a repository of the Hub; fields without a file are `None`.

        Args:
            model_id (`str` or `Path`): folder or repository id.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like.

        Raises:
            ValueError: where a file is damaged.
        """
        files = [
            cached_file(str(model_id), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            for name in (CONFIG_NAME, PLAN_NAME, SCORES_NAME, OUTCOME_NAME)
        ]
        config, plan, scores, outcome = (None if file is None else Path(file) for file in files)
        values = {} if outcome is None else _json_object(outcome)
        return cls(
            config=None if config is None else PruningConfig.from_pretrained(config.parent),
            plan=None if plan is None else PruningPlan.load(plan),
            scores=None if scores is None else Scores.load(scores),
            # Sizes without a plan belong to another pruning.
            outcome=_outcome(values["report"]) if plan is not None and values.get("report") else None,
            recovery=values.get("recovery"),
            comparison=Comparison.from_list(values["comparison"]) if values.get("comparison") else None,
        )


def save_pretrained(
    model: PreTrainedModel, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
) -> None:
    """Save a model of a stock class that was pruned, with its record.

    Args:
        model (`PreTrainedModel`): the model, with the attribute `pruning_record`.
        save_directory, is_main_process, kwargs: as for the `save_pretrained` of its class.
    """
    type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **kwargs)
    # With adapters inside, adapters alone are saved.
    if is_main_process and not getattr(model, "_hf_peft_config_loaded", False):
        vars(model)["pruning_record"].save(save_directory)


def _outcome(values: Any) -> Outcome:
    try:
        return Outcome.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{OUTCOME_NAME} is damaged. {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(values).__name__}.")
    return values
