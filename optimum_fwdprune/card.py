"""The model card of a pruned checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from .evaluation import Comparison
from .hub import CARD_NAME, LICENSES_THAT_NAME, Base
from .record import Record, command_of
from .report import PruningReport, plan_table, plot_plan


PICTURE_NAME = "kept_units.png"


def write_card(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    record: Record,
    report: PruningReport | None,
    base: Base | None,
    comparison: Comparison | None,
) -> None:
    """Write a checkpoint's model card, its picture, and the base's licence into its folder.

    Args:
        folder (`Path`): of the checkpoint.
        name (`str`): what it is loaded by: a repository, or a folder's name.
        model (`PreTrainedModel`): the pruned model.
        record (`Record`): how it was pruned, and trained afterwards.
        report (`PruningReport`, *optional*): sizes before and after.
        base (`Base`, *optional*): what was pruned.
        comparison (`Comparison`, *optional*): what was measured; the last model is this one.
    """
    if record.plan is not None and importlib.util.find_spec("matplotlib"):
        plot_plan(record.plan, folder / PICTURE_NAME)
    for file in base.legal_files if base else ():
        shutil.copyfile(file, folder / file.name)
    sections = [
        _introduction(name, record, base),
        _loading(name, model),
        _sizes(report),
        _measured(comparison),
        _kept(record, folder / PICTURE_NAME),
        _reproduction(record, base),
        _limits(base),
    ]
    data = _metadata(name, model, base, comparison)
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def _metadata(name: str, model: PreTrainedModel, base: Base | None, comparison: Comparison | None) -> ModelCardData:
    measured: Sequence[Any] = comparison.evaluations[-1:] if comparison else ()
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset.lower().replace(" ", "-"),
            dataset_name=dataset,
            metric_type=metric,
            metric_value=value,
        )
        for evaluation in measured
        for dataset, metric, value in (
            *((text, "perplexity", loss.perplexity) for text, loss in evaluation.texts.items()),
            *((score.task, score.metric, score.value) for score in evaluation.tasks),
        )
    ]
    carried_over: dict[str, Any] = dict(base.license) if base else {}
    return ModelCardData(
        base_model=base.name if base and base.is_repository else None,
        library_name="transformers",
        pipeline_tag="text-generation" if model.can_generate() else None,
        tags=["pruned", "optimum-fwdprune"],
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **carried_over,
    )


def _introduction(name: str, record: Record, base: Base | None) -> str:
    of = f"`{base.name}`" if base else "a dense model"
    if base and base.is_repository:
        of = f"[{base.name}](https://huggingface.co/{base.name})"
    wanted = LICENSES_THAT_NAME.get(base.license.get("license", "")) if base else None
    how = f" by `{record.config.method}`" if record.config else ""
    text = (
        f"# {name.rpartition('/')[2]}\n\n{of}, made smaller by structured pruning{how}: attention heads and MLP "
        f"channels were cut out for good, with forward passes only, by optimum-fwdprune."
    )
    return text + (f"\n\n**Built with {wanted}.**" if wanted else "")


def _loading(name: str, model: PreTrainedModel) -> str:
    auto = model.config.auto_map or {}
    auto_class = next((each for each in auto if each.endswith(type(model).__name__.rpartition("For")[2])), "AutoModel")
    return f"""## Load it

```python
# 1. Without any package: the modelling code lies beside the weights.
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

```python
# 2. With optimum-fwdprune, and no remote code.
import optimum_fwdprune
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}")
```

```python
# 3. To prune further, recover or evaluate.
from optimum_fwdprune import FwdPruner

pruner = FwdPruner.from_pretrained("{name}")
```

Layers of different sizes need transformers 5.14 or later."""


def _sizes(report: PruningReport | None) -> str:
    if report is None:
        return ""
    rows = [
        ("", "before", "after"),
        ("---", "---:", "---:"),
        ("parameters", f"{report.parameters_before:,}", f"{report.parameters_after:,}"),
        (
            "of them prunable",
            f"{report.prunable_parameters:,}",
            f"{report.prunable_parameters - report.removed_parameters:,}",
        ),
        ("weights, MB", f"{report.bytes_before / 1e6:,.1f}", f"{report.bytes_after / 1e6:,.1f}"),
    ]
    if report.speedup is not None:
        rows.append(("prefill, times as fast", "1.00", f"{report.speedup.measured:.2f}"))
    return "## Size\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _measured(comparison: Comparison | None) -> str:
    return f"## Measured\n\n{comparison.to_markdown().rstrip()}" if comparison else ""


def _kept(record: Record, picture: Path) -> str:
    if record.plan is None:
        return ""
    shown = f"![kept units by layer]({picture.name})\n\n" if picture.exists() else ""
    return f"## What each layer kept\n\n{shown}```\n{plan_table(record.plan)}\n```"


def _reproduction(record: Record, base: Base | None) -> str:
    if record.config is None:
        return ""
    command = command_of(record.config, base.name if base else "MODEL", plan=record.plan)
    text = f"## Make it again\n\n```bash\n{command}\n```\n\n"
    text += "`fwdprune_config.json` is the request and `fwdprune_plan.json` what it kept: `--plan` replays it."
    if recovery := record.outcome.get("recovery"):
        lines = "\n".join(f"- `{name}`: {value}" for name, value in recovery.items())
        text += f"\n\nTrained afterwards (`optimum-cli fwdprune recover`):\n\n{lines}"
    return text


def _limits(base: Base | None) -> str:
    text = (
        "## Limits\n\nPruning costs quality, and more so on text unlike the calibration text. Alignment and safety of "
        "the base were not tested again."
    )
    return text + (" The base's licence applies." if base and base.license else "")
