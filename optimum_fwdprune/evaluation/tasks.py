"""Scores on tasks of lm-evaluation-harness: classification, multiple choice and generation."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading.offline import naming_offline
from ..loading.state import evaluating
from ..runs.randomness import random_states_kept


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


# Names of sets of tasks: those that papers on pruning report, without examples in the prompt.
TASK_PRESETS = {
    "zero-shot": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Args:
        task, metric (`str`): names in the harness; a metric's filter other than `none` follows after a comma.
        value (`float`): the score.
        standard_error (`float`, *optional*): standard error over the task's rows.
        rows (`int`, *optional*): number of rows that were scored; `None` for groups of tasks.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    rows: int | None


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path],
    batch_size: int = 8,
    seed: int = 0,
    **options: Any,
) -> list[TaskScore]:
    """Score a model on tasks of lm-evaluation-harness (`pip install "optimum-fwdprune[eval]"`).

    Args:
        model (`PreTrainedModel`): a causal language model, dense or pruned.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        tasks (sequence of `str`): names of tasks, groups or tags; `zero-shot`, the set that papers on pruning report
            (BoolQ, PIQA, HellaSwag, WinoGrande, ARC easy and challenge, OpenBookQA); or folders of task YAML files,
            all of which are run. A task whose `dataset_path` is `json` with local `data_files` needs no network.
        batch_size (`int`, defaults to 8): requests per forward pass.
        seed (`int`, defaults to 0): seed of the choice of examples in the prompt.
        options: for `lm_eval.simple_evaluate`: `num_fewshot`, the number of examples in the prompt (by default the
            task's own); `limit`, the number of rows of each task that are scored (by default all);
            `apply_chat_template`, whether to put prompts through the tokenizer's chat template; and its other
            arguments.

    Raises:
        ValueError: where there is no such task (the message names similar ones), or no task in a folder.
        OSError: where the data of a task would have to be downloaded in offline mode.
        ImportError: where the harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError('Tasks need lm-evaluation-harness: pip install "optimum-fwdprune[eval]".') from error
    names, manager = _resolve(tasks)
    data = f"the data of {', '.join(names)}"
    # The harness seeds the whole process.
    with random_states_kept(), evaluating(model), naming_offline(data, "leave these tasks out"):
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=names,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            **options,
        )
    assert results is not None
    rows = {name: counts["effective"] for name, counts in results["n-samples"].items()}
    return [score for name, values in results["results"].items() for score in _scores(name, values, rows.get(name))]


def _resolve(tasks: Sequence[str | Path]) -> tuple[list[str], TaskManager]:
    """Return the names of all tasks, and a task manager that can load them."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise ValueError("No task was named; zero-shot is the set that papers on pruning report.")
    named: list[str] = []
    folders: list[Path] = []
    for task in tasks:
        if Path(task).is_dir():
            folders.append(Path(task))
            own_tasks = TaskManager(include_path=str(task), include_defaults=False).all_tasks
            if not own_tasks:
                raise ValueError(f"{task} holds no task: no YAML file in it names one under `task`.")
            named += own_tasks
        else:
            named += TASK_PRESETS.get(str(task), (str(task),))
    # Listing the harness's own tasks takes seconds.
    needs_defaults = len(folders) < len(tasks)
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=needs_defaults)
    known = set(manager.all_tasks)
    for name in named:
        if name not in known:
            nearest = difflib.get_close_matches(name, [*TASK_PRESETS, *known], n=5, cutoff=0.5)
            hint = f"similar names are {', '.join(nearest)}" if nearest else "`lm_eval ls tasks` lists all tasks"
            raise ValueError(f"There is no task {name!r}; {hint}. A folder of task files may be named instead.")
    return list(dict.fromkeys(named)), manager


def _scores(task: str, values: dict[str, Any], rows: int | None) -> list[TaskScore]:
    scores = []
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else key
        scores.append(TaskScore(task, name, float(value), error if isinstance(error, float) else None, rows))
    return scores
