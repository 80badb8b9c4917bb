"""What a pruned checkpoint says of its pruning: the request, the plan, the scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from .configuration import CONFIG_NAME
from .methods import PruningConfig
from .plan import PLAN_NAME, PruningPlan
from .scores import SCORES_NAME, Scores


@dataclass(frozen=True)
class Record:
    """The request, the plan and the scores of a pruning, as far as they are known."""

    config: PruningConfig | None
    plan: PruningPlan | None
    scores: Scores | None

    def save(self, folder: Path) -> None:
        """Write a file for each of them."""
        if self.config is not None:
            self.config.save_pretrained(folder)
        if self.plan is not None:
            self.plan.save(folder / PLAN_NAME)
        if self.scores is not None:
            self.scores.save(folder / SCORES_NAME)

    @classmethod
    def of_checkpoint(cls, model_id: str | Path, **hub_kwargs) -> Record:
        """Read the record of a folder, or of a repository of the Hub; what is not there is `None`.

        Args:
            model_id (`str` or `Path`): folder or repository id.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like.
        """
        found = [
            cached_file(str(model_id), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            for name in (CONFIG_NAME, PLAN_NAME, SCORES_NAME)
        ]
        config, plan, scores = (None if file is None else Path(file) for file in found)
        return cls(
            None if config is None else PruningConfig.from_pretrained(config.parent),
            None if plan is None else PruningPlan.load(plan),
            None if scores is None else Scores.load(scores),
        )
