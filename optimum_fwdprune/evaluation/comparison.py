"""Comparisons of models: the quality, speed and size of several models in one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..files import as_path, check_output_file, write_text_atomically
from ..words import html_table, public_name, render_table
from .perplexity import TextLoss
from .speed import Benchmark, Spread, Timing
from .tasks import TaskScore


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model.

    Args:
        name (`str`): name of the model.
        texts (`dict[str, TextLoss]`): losses by name of the text.
        tasks (`list[TaskScore]`): scores of lm-evaluation-harness.
        benchmark (`Benchmark`, *optional*): size and speed.
    """

    name: str
    texts: dict[str, TextLoss]
    tasks: list[TaskScore]
    benchmark: Benchmark | None = None

    def __str__(self) -> str:
        return str(Comparison([self]))

    def _repr_html_(self) -> str:
        return Comparison([self])._repr_html_()

    def figures(self, first: Evaluation | None = None) -> dict[str, float | None]:
        """Return every figure by its name and unit, with speed-ups over `first` if it is set."""
        figures: dict[str, float | None] = {}
        speed = self.benchmark
        if speed is not None:
            figures["parameters"] = speed.parameters
            figures["weights, bytes"] = speed.bytes
            figures["peak memory, bytes"] = speed.peak_bytes
            figures["MACs per token"] = speed.macs_per_token
            for place, timing in enumerate(speed.timings):
                size = f"{timing.batch_size} x {timing.prompt_tokens}"
                figures[f"prefill {size}, ms"] = 1e3 * timing.prefill.median
                figures[f"prefill {size}, tokens/s"] = timing.prefill_tokens_per_second
                figures[f"decode {size}, tokens/s"] = timing.decode_tokens_per_second
                if first is not None and first.benchmark is not None:
                    old = first.benchmark.timings[place]
                    figures[f"prefill {size}, times as fast"] = old.prefill.median / timing.prefill.median
                    figures[f"decode {size}, times as fast"] = old.decode.median / timing.decode.median
        for name, loss in self.texts.items():
            figures[f"perplexity, {name}"] = loss.perplexity
        for score in self.tasks:
            figures[f"{score.task}, {score.metric}"] = score.value
            figures[f"{score.task}, {score.metric}, standard error"] = score.standard_error
        return figures


@dataclass(frozen=True)
class Comparison:
    """The measurements of several models; speed-ups are relative to the first one.

    Args:
        evaluations (`list[Evaluation]`): one per model.
    """

    evaluations: list[Evaluation]

    def figures(self) -> list[dict[str, float | None]]:
        """Return the figures of every model under the same names, in the same order."""
        first = self.evaluations[0] if len(self.evaluations) > 1 else None
        return [evaluation.figures(first) for evaluation in self.evaluations]

    def of(self, name: str) -> Comparison | None:
        """Return a comparison of the first model and the one with this name; `None` unless exactly one matches.

        Args:
            name (`str`): the name that was passed to `compare`, or another path with the same last part.
        """
        first, *others = self.evaluations
        # The last part of the dense model's path does not count: it may be equal to a pruned model's by chance.
        last_parts = (others or [first], lambda path: Path(path).name)
        for candidates, label_of in ((self.evaluations, str), last_parts):
            matching = [candidate for candidate in candidates if label_of(candidate.name) == label_of(name)]
            if len(matching) == 1:
                return Comparison(matching if matching[0] is first else [first, *matching])
        return None

    def last(self) -> Comparison:
        """Return a comparison that has the last model only."""
        return Comparison(self.evaluations[-1:])

    def without_folders(self) -> Comparison:
        """Return the comparison with names in the place of local paths, since checkpoints are shared."""
        return Comparison([replace(evaluation, name=public_name(evaluation.name)) for evaluation in self.evaluations])

    def to_json(self) -> str:
        """Return all measurements, spreads included, as JSON."""
        return json.dumps(self.to_list(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of all models as JSON values, with `name` and `figures` per model in `models`."""
        models = zip(self.evaluations, self.figures())
        return {"models": [{"name": evaluation.name, "figures": figures} for evaluation, figures in models]}

    def to_list(self) -> list[dict[str, Any]]:
        """Return all measurements as JSON values, one entry per model."""
        return [asdict(evaluation) for evaluation in self.evaluations]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> Comparison:
        """Build the comparison that `to_list` returned.

        Raises:
            ValueError: where something is missing.
        """
        try:
            evaluations = [_evaluation(value) for value in values]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"These are not the measurements of models: {type(error).__name__}: {error}.") from error
        if not evaluations:
            raise ValueError("These are not the measurements of models: there is no model.")
        return cls(evaluations)

    @classmethod
    def load(cls, file: str | Path) -> Comparison:
        """Read the comparison that `save` wrote to a `.json` file.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: where the file holds something else.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"There is no file {file}; `optimum-cli fwdprune compare --output FILE.json` writes one."
            )
        try:
            return cls.from_list(json.loads(Path(file).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(
                f"{file} holds no comparison; `optimum-cli fwdprune compare --output FILE.json` writes one. {error}"
            ) from error

    def to_csv(self) -> str:
        """Return a CSV table with a line per model and a column per figure, which is not rounded."""
        all_figures = self.figures()
        output = io.StringIO()
        writer = csv.DictWriter(output, ["model", *all_figures[0]], lineterminator="\n")
        writer.writeheader()
        for evaluation, figures in zip(self.evaluations, all_figures):
            writer.writerow({"model": evaluation.name, **figures})
        return output.getvalue()

    def to_markdown(self) -> str:
        """Return a table with a row per figure and a column per model."""
        rows = ([cell.replace("|", "\\|") for cell in row] for row in self._rows())
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

    def __str__(self) -> str:
        header, _, *rows = self._rows()
        return render_table(header, rows)

    def _repr_html_(self) -> str:
        header, _, *rows = self._rows()
        return html_table(header, rows)

    def save(self, file: str | Path) -> None:
        """Write the comparison to a `.md`, `.json` or `.csv` file."""
        write_text_atomically(check_output_file(file), FORMATS[checked_format(file)](self))

    def _rows(self) -> list[list[str]]:
        all_figures = self.figures()
        rows = [["", *(evaluation.name for evaluation in self.evaluations)], ["---", *("---:" for _ in all_figures)]]
        for name in all_figures[0]:
            if not name.endswith("standard error"):
                rows.append([name, *(_shown(figures, name) for figures in all_figures)])
        return rows


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    speed = values["benchmark"]
    if speed is not None:
        timings = [
            Timing(**{**timing, "prefill": Spread(**timing["prefill"]), "decode": Spread(**timing["decode"])})
            for timing in speed["timings"]
        ]
        speed = Benchmark(**{**speed, "timings": timings})
    texts = {name: TextLoss(**loss) for name, loss in values["texts"].items()}
    return Evaluation(values["name"], texts, [TaskScore(**score) for score in values["tasks"]], speed)


def _shown(figures: Mapping[str, float | None], name: str) -> str:
    value, error = figures[name], figures.get(f"{name}, standard error")
    assert value is not None
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    return text if error is None else f"{text} ± {error:.3f}"


FORMATS = {".md": Comparison.to_markdown, ".json": Comparison.to_json, ".csv": Comparison.to_csv}


def checked_format(file: str | Path) -> str:
    """Return the ending of a file, which determines the format of a comparison, before anything is measured.

    Raises:
        ValueError: where there is no such format.
        OSError: where the file cannot be written.
    """
    ending = as_path(file, "file").suffix
    if ending not in FORMATS:
        raise ValueError(f"{file} must end in one of {', '.join(FORMATS)}, which determines the format.")
    check_output_file(file)
    return ending
