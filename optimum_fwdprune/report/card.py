"""The model card of a pruned checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from ..allocation.losses import outside_units
from ..allocation.plan import PLAN_NAME
from ..architectures import get_architecture, is_pruned
from ..loading.base import CARD_NAME, Base
from ..record.outcome import Outcome
from ..record.record import Record
from ..record.reproduction import reproduction_of
from ..request.files import CONFIG_NAME
from .measurements import measurements_section, results_of
from .pictures import plot_plan
from .sentences import (
    calibration_of,
    how_it_was_trained,
    how_small_it_is,
    how_units_were_chosen,
    what_became_of_the_weights,
    what_was_removed,
)
from .tables import plan_table
from .training import datasets_of, training_section


PICTURE_NAME = "kept_units.png"


def write_card(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    record: Record,
    base: Base | None,
) -> None:
    """Write a checkpoint's model card, its picture, and the base's licence into its folder.

    Args:
        folder (`Path`): the checkpoint's folder.
        name (`str`): the name that it is loaded by: a repository, or a folder's name.
        model (`PreTrainedModel`): the pruned model.
        record (`Record`): how it was pruned, trained afterwards, and measured.
        base (`Base`, *optional*): the model that was pruned.
    """
    if record.plan is not None and importlib.util.find_spec("matplotlib"):
        plot_plan(record.plan, folder / PICTURE_NAME)
    for file, content in base.legal_files.items() if base else ():
        (folder / file).write_bytes(content)
    sections = [
        _introduction(name, record, base),
        _loading(name, model, folder),
        _sizes(record.outcome),
        measurements_section(record.comparison),
        _kept(record, folder / PICTURE_NAME),
        _reproduction(name, record, base),
        _limits(record, base),
    ]
    data = _metadata(name, model, record, base)
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


# The pipeline of a model on the Hub, by the Auto class that loads it.
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}


def _metadata(name: str, model: PreTrainedModel, record: Record, base: Base | None) -> ModelCardData:
    """Return the entries that the Hub reads: base, licence, tags, training data and measurements."""
    pipeline = PIPELINES.get(_auto_class_of(model))
    results = results_of(record.comparison, pipeline)
    carried_over: dict[str, Any] = dict(base.license) if base else {}
    if base and base.is_repository:
        # Of the relations that the Hub has, a pruned model with weights of its own is a finetuned one.
        carried_over |= {"base_model": base.name, "base_model_relation": "finetune"}
    return ModelCardData(
        language=list(base.languages) if base and base.languages else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["pruned", "optimum-fwdprune"],
        datasets=datasets_of(record.recovery) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **carried_over,
    )


def _auto_class_of(model: PreTrainedModel) -> str:
    return str(get_architecture(model.config).pruned_class(model)._auto_class)


def _introduction(name: str, record: Record, base: Base | None) -> str:
    origin = f"`{base.name}`" if base else "a dense model"
    if base and base.is_repository:
        origin = f"[{base.name}](https://huggingface.co/{base.name})"
    wanted = base.wanted_name if base else None
    sentences = [
        f"This is {origin}, made smaller by structured pruning with optimum-fwdprune.",
        *how_small_it_is(record.outcome),
        *what_was_removed(record.plan),
        *how_units_were_chosen(record),
        *what_became_of_the_weights(record),
        *how_it_was_trained(record),
    ]
    text = f"# {name.rpartition('/')[2]}\n\n{' '.join(sentences)}"
    return text + (f"\n\n**Built with {wanted}.**" if wanted else "")


def _loading(name: str, model: PreTrainedModel, folder: Path) -> str:
    """Return how to load the model, and its processor or tokenizer where the folder holds one."""
    auto_class, reader = _auto_class_of(model), _reader_in(folder)
    imported = f"{auto_class}, {reader}" if reader else auto_class

    def loaded(options: str = "") -> str:
        lines = [f'model = {auto_class}.from_pretrained("{name}"{options})']
        if reader:
            lines.append(f'{reader[4:].lower()} = {reader}.from_pretrained("{name}"{options})')
        return "\n".join(lines)

    further = f"""```python
from optimum_fwdprune import FwdPruner

pruner = FwdPruner.from_pretrained("{name}")
```"""
    if not is_pruned(model.config):
        return f"""## Load it

This is a checkpoint of the stock model class, which every program for this family loads:

```python
from transformers import {imported}

{loaded()}
```

With optimum-fwdprune, it can be pruned further, recovered or evaluated:

{further}"""
    return f"""## Load it

Without optimum-fwdprune, transformers runs the modelling code in the checkpoint:

```python
from transformers import {imported}

{loaded(", trust_remote_code=True")}
```

With optimum-fwdprune, no remote code is run:

```python
import optimum_fwdprune
from transformers import {imported}

{loaded()}
```

To prune it further, recover or evaluate it:

{further}

Layers of different sizes need transformers 5.14 or later."""


def _reader_in(folder: Path) -> str | None:
    """Return the Auto class of the processor or tokenizer in a folder; `None` where it holds neither."""
    if any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        return "AutoProcessor"
    return "AutoTokenizer" if (folder / "tokenizer_config.json").exists() else None


def _sizes(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    rows = [
        ("", "before", "after", "change"),
        ("---", "---:", "---:", "---:"),
        (
            "parameters",
            f"{outcome.parameters_before:,}",
            f"{outcome.parameters_after:,}",
            f"{-outcome.model_sparsity:+.1%}",
        ),
        (
            "prunable parameters",
            f"{outcome.prunable_parameters:,}",
            f"{outcome.prunable_parameters - outcome.removed_parameters:,}",
            f"{-outcome.sparsity:+.1%}",
        ),
        (
            "weights, MB",
            f"{outcome.bytes_before / 1e6:,.1f}",
            f"{outcome.bytes_after / 1e6:,.1f}",
            f"{outcome.bytes_after / outcome.bytes_before - 1:+.1%}",
        ),
    ]
    if outcome.speedup is not None and outcome.speedup.measured is not None:
        rows.append((outcome.speedup.label, "1.00", f"{outcome.speedup.measured:.2f}", ""))
    text = "## Size\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
    outside = outside_units(outcome.parameters_before, outcome.prunable_parameters)
    return f"{text}\n\n{outside}" if outside else text


def _kept(record: Record, picture: Path) -> str:
    if record.plan is None:
        return ""
    shown = f"![kept units by layer]({picture.name})\n\n" if picture.exists() else ""
    return f"## What each layer kept\n\n{shown}```\n{plan_table(record.plan)}\n```"


def _reproduction(name: str, record: Record, base: Base | None) -> str:
    repository = base.name if base and base.is_repository else None
    made = reproduction_of(record, calibration_of(record), repository)
    if made is None:
        return ""
    text = "## Reproduce it\n\n"
    if made.command is not None:
        text += f"```bash\n{made.command}\n```\n\n"
    else:
        text += f"{made.notes[0]}\n\n" + _python_of(name, repository)
    notes = made.notes if made.command is not None else made.notes[1:]
    versions = (record.plan.metadata.get("versions") if record.plan else None) or {}
    if versions:
        listed = ", ".join(f"{package.replace('_', '-')} {version}" for package, version in versions.items())
        notes = [*notes, f"The weights are the same with the same versions ({listed}) on the same kind of device."]
    text += "\n".join(f"- {note}" for note in notes)
    text += (
        f"\n\n`{CONFIG_NAME}` is the request, and `{PLAN_NAME}` lists the units that were kept: `--plan` keeps the "
        f"same units, and refits weights if `--reconstruction` is set too."
    )
    if record.recovery:
        text += f"\n\n{training_section(record.recovery)}"
    return text


def _python_of(name: str, repository: str | None) -> str:
    return f"""```python
from optimum_fwdprune import FwdPruner, PruningConfig

pruner = FwdPruner.from_pretrained("{repository or "MODEL"}")
pruner.prune(PruningConfig.from_pretrained("{name}"), dataset=DATASET)
```

"""


def _limits(record: Record, base: Base | None) -> str:
    text = "## Limits\n\nPruning costs quality"
    if calibration_of(record):
        text += ", and more of it on text that differs from the calibration text"
    text += ". The alignment and safety of the pruned model were not tested."
    return text + (" The base's licence applies." if base and base.license else "")
