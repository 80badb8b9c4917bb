"""Models side by side: one table of quality, speed and size."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import as_path, check_output_file, write_text_atomically
from ..words import html_table, render_table
from .perplexity import TextLoss, texts_loss
from .speed import Benchmark, Spread, Timing, benchmark
from .tasks import TaskScore, evaluate_tasks


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Args:
        name (`str`): of the model.
        texts (`dict[str, TextLoss]`): by name of the text.
        tasks (`list[TaskScore]`): of lm-evaluation-harness.
        benchmark (`Benchmark`, *optional*): size and speed.
    """

    name: str
    texts: dict[str, TextLoss]
    tasks: list[TaskScore]
    benchmark: Benchmark | None = None

    def figures(self, first: Evaluation | None = None) -> dict[str, float | None]:
        """Return every figure by its name and unit; speed-ups against `first` where it is another model."""
        found: dict[str, float | None] = {}
        speed = self.benchmark
        if speed is not None:
            found["parameters"] = speed.parameters
            found["weights, bytes"] = speed.bytes
            found["peak memory, bytes"] = speed.peak_bytes
            found["MACs per token"] = speed.macs_per_token
            for place, timing in enumerate(speed.timings):
                size = f"{timing.batch_size} x {timing.prompt_tokens}"
                found[f"prefill {size}, ms"] = 1e3 * timing.prefill.median
                found[f"prefill {size}, tokens/s"] = timing.prefill_tokens_per_second
                found[f"decode {size}, tokens/s"] = timing.decode_tokens_per_second
                if first is not None and first.benchmark is not None:
                    old = first.benchmark.timings[place]
                    found[f"prefill {size}, times as fast"] = old.prefill.median / timing.prefill.median
                    found[f"decode {size}, times as fast"] = old.decode.median / timing.decode.median
        for name, loss in self.texts.items():
            found[f"perplexity, {name}"] = loss.perplexity
        for score in self.tasks:
            found[f"{score.task}, {score.metric}"] = score.value
            found[f"{score.task}, {score.metric}, standard error"] = score.standard_error
        return found


@dataclass(frozen=True)
class Comparison:
    """Models side by side; the first is what speed-ups are against.

    Args:
        evaluations (`list[Evaluation]`): a model each.
    """

    evaluations: list[Evaluation]

    def figures(self) -> list[dict[str, float | None]]:
        """Return the figures of every model under the same names, in the same order."""
        first = self.evaluations[0] if len(self.evaluations) > 1 else None
        return [each.figures(first) for each in self.evaluations]

    def of(self, name: str) -> Comparison | None:
        """Return the first model beside the one called `name`; `None` where none is, or several are.

        Args:
            name (`str`): as it was given to `compare`, or another path with the same last part.
        """
        first, *others = self.evaluations
        # A dense model that is called alike somewhere else is not it.
        last_parts = (others or [first], lambda path: Path(path).name)
        for candidates, called in ((self.evaluations, str), last_parts):
            found = [each for each in candidates if called(each.name) == called(name)]
            if len(found) == 1:
                return Comparison(found if found[0] is first else [first, *found])
        return None

    def last(self) -> Comparison:
        """Return the last model alone."""
        return Comparison(self.evaluations[-1:])

    def to_json(self) -> str:
        """Return all that was measured, spreads included."""
        return json.dumps(self.to_list(), indent=2) + "\n"

    def to_list(self) -> list[dict[str, Any]]:
        """Return all that was measured as JSON values, a model each."""
        return [asdict(each) for each in self.evaluations]

    @classmethod
    def from_list(cls, values: Sequence[Mapping[str, Any]]) -> Comparison:
        """Build the comparison that `to_list` returned.

        Raises:
            ValueError: where something is missing.
        """
        try:
            found = [_evaluation(each) for each in values]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"This is not what models were measured as: {type(error).__name__}: {error}.") from error
        if not found:
            raise ValueError("This is not what models were measured as: there is no model.")
        return cls(found)

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
        """Return a line per model and a column per figure, unrounded."""
        found = self.figures()
        output = io.StringIO()
        writer = csv.DictWriter(output, ["model", *found[0]], lineterminator="\n")
        writer.writeheader()
        for each, figures in zip(self.evaluations, found):
            writer.writerow({"model": each.name, **figures})
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
        found = self.figures()
        rows = [["", *(each.name for each in self.evaluations)], ["---", *("---:" for _ in found)]]
        for name in found[0]:
            if not name.endswith("standard error"):
                rows.append([name, *(_shown(figures, name) for figures in found)])
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
    """Return the ending that says how to write a comparison.

    Raises:
        ValueError: where there is no such format.
        OSError: where the file cannot be written; what is measured takes long.
    """
    ending = as_path(file, "file").suffix
    if ending not in FORMATS:
        raise ValueError(f"{file} must end in one of {', '.join(FORMATS)}; it says which format to write.")
    check_output_file(file)
    return ending


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Iterable[str]] | None = None,
    tasks: Sequence[str | Path] = (),
    name: str = "model",
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    **task_options,
) -> Evaluation:
    """Measure how good a model is: perplexity of texts, and scores of tasks.

    Args:
        model (`PreTrainedModel`): a causal language model, dense or pruned.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        texts (mapping of `str` to strings, *optional*): texts by name, each joined as it is.
        tasks (sequence of `str`): see [`evaluate_tasks`]; `task_options` are its.
        name (`str`): of the model.
        max_length, stride, batch_size: of the perplexity's windows, see [`text_loss`].
    """
    losses = {
        text: texts_loss(model, tokenizer, pieces, max_length, stride, batch_size)
        for text, pieces in (texts or {}).items()
    }
    scores = evaluate_tasks(model, tokenizer, tasks, batch_size=batch_size, **task_options) if tasks else []
    return Evaluation(name, losses, scores)


def compare(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]] | None = None,
    tasks: Sequence[str | Path] = (),
    batch_sizes: Sequence[int] = (1,),
    prompt_tokens: Sequence[int] = (512,),
    new_tokens: int = 16,
    repeats: int = 5,
    **evaluation_options,
) -> Comparison:
    """Measure models against each other: size, speed, perplexity of texts and scores of tasks.

    Args:
        models (mapping of `str` to `PreTrainedModel`): by name, of one vocabulary; speed-ups are against the first.
        tokenizer (`PreTrainedTokenizerBase`): theirs.
        texts (mapping of `str` to sequence of `str`, *optional*): see [`evaluate`].
        tasks (sequence of `str` or `Path`): likewise.
        batch_sizes (sequence of `int`, defaults to `(1,)`): see [`benchmark`].
        prompt_tokens (sequence of `int`, defaults to `(512,)`): likewise.
        new_tokens (`int`, defaults to 16): likewise.
        repeats (`int`, defaults to 5): likewise.
        evaluation_options: more for [`evaluate`].

    Raises:
        ValueError: where the vocabularies differ, so that perplexities would not compare.
    """
    sizes = {name: model.config.get_text_config().vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"The models have vocabularies of different sizes ({listed}), so their perplexities differ in "
            "meaning; compare models of one tokenizer."
        )
    speeds = benchmark(list(models.values()), batch_sizes, prompt_tokens, new_tokens, repeats)
    found = []
    for (name, model), speed in zip(models.items(), speeds):
        quality = evaluate(model, tokenizer, texts, tasks, name, **evaluation_options)
        found.append(Evaluation(name, quality.texts, quality.tasks, speed))
    return Comparison(found)
