"""Carrying out a sweep: models are pruned and measured one after the other, from scores and statistics they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..checkpoint.pruned_checkpoint import PrunedCheckpoint
from ..data.amount import Amount
from ..data.calibration import Calibration
from ..data.held_out import windows_and_held_out
from ..loading.offloading import read_parameter
from ..planning.sharing import shared_dense_stream
from ..pruning import Pruning
from ..record.record import Record
from ..request.config import PruningConfig
from ..request.registry import get_method
from ..runs.locks import held
from ..runs.progress import announce
from ..runs.resume import Resume, digest_of
from ..scoring.score_units import needs_calibration
from ..scoring.scores import Scores
from .folder import SweepFolder
from .grid import Cell, Grid
from .measuring import HELD_OUT, Measures, Meter
from .result import SweepResult, SweepRow


@dataclass(frozen=True)
class Workplace:
    """The model of a sweep, and how its prunings are started.

    Args:
        prunings (`Callable[[Any], Pruning]`): starts a pruning of the model with a dataset, which replaces that of the
            request if it is not `None`.
        dataset: calibration data, which replaces that of the requests; may be `None`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved with checkpoints, and required for texts.
        processor (`ProcessorMixin`, *optional*): saved with checkpoints.
    """

    prunings: Callable[[Any], Pruning]
    dataset: Any
    tokenizer: PreTrainedTokenizerBase | None
    processor: ProcessorMixin | None


class Sweep:
    """Prunes a model to many sizes, which share scores, statistics and passes of the dense model, and measures them.

    Args:
        folder (`str` or `Path`): folder of the results. A sweep of the same model that it holds is continued.
        grid (`Grid`): the requests.
        workplace (`Workplace`): the model, which is not changed.
        measures (`Measures`): what is measured.
        keep (iterable of `float`): sizes whose models are saved as checkpoints, in subfolders.
    """

    def __init__(
        self,
        folder: str | Path,
        grid: Grid,
        workplace: Workplace,
        measures: Measures,
        keep: Iterable[float] = (),
    ):
        self._main = workplace.prunings(workplace.dataset)
        grid = grid.mapped(self._main.with_defaults)
        self._folder = SweepFolder(folder, grid)
        self._grid, self._workplace, self._measures = grid, workplace, measures
        self._keep = set(keep)
        grid.check_sizes(self._keep)
        self._cells = list(grid.cells)

    def run(self) -> SweepResult:
        """Carry out the sweep; rows that the folder holds already are not repeated.

        Raises:
            ValueError: where a request is impossible, or the folder holds a sweep of another model or other texts.
            BlockingIOError: where another process uses the folder.
        """
        for cell in self._grid.cells:
            self._main.check(cell.config)
        windows = self._checked_windows()
        with held(self._folder.path, "another folder"):
            if not windows:
                self._measures_on_held_out(windows)
            identity = self._measures.identity(windows) | {"model": self._digest}
            result = self._folder.continued(identity)
            self._cells = self._folder.cells(result)
            missing = [cell for cell in self._cells if self._is_missing(cell, result)]
            self._check_checkpoints(missing)
            if missing:
                meter = Meter(self._main.model, windows, self._measures, missing[0].config.batch_size)
                result.dense = result.dense or meter.dense_figures()
                for _, cells in groupby(missing, key=lambda cell: cell.config.seed):
                    self._prune_all(list(cells), meter, result)
            self._folder.finish(result)
        return result

    def _checked_windows(self) -> dict[str, list[Calibration]]:
        """Check what is measured, and return the windows of the texts, if there are any."""
        model, measures = self._main.model, self._measures
        measures.check_speed(model)
        seeds = {cell.config.seed for cell in self._grid.cells}
        if not measures.texts and len(seeds) > 1:
            raise ValueError(
                "Several seeds draw different calibration windows, so that no windows can be held out for all. Name "
                "a text to measure on."
            )
        return measures.windows_of_texts(model, self._workplace.tokenizer)

    def _measures_on_held_out(self, windows: dict[str, list[Calibration]]) -> None:
        """Draw calibration windows, of which some are held out to measure on; the others replace the dataset."""
        state = str(self._folder.state("calibration"))
        # Reconstructions may have different default numbers of windows.
        most = self._with_most_text(cell.config for cell in self._grid.cells)
        config = dataclasses.replace(most, resume=state)
        calibrated, held_out = windows_and_held_out(
            Amount.of(config, self._main.model).windows, lambda more: self._main.calibration(config, more)
        )
        windows[HELD_OUT] = [held_out]
        self._main = self._workplace.prunings(calibrated)

    def _with_most_text(self, requests: Iterable[PruningConfig]) -> PruningConfig:
        """Return the first of the requests that have the most calibration windows."""
        return max(requests, key=lambda request: Amount.of(request, self._main.model).windows)

    def _check_checkpoints(self, cells: Iterable[Cell]) -> None:
        """Raise an error where a checkpoint to keep cannot be written."""
        checkpoint = PrunedCheckpoint(self._main.model, self._workplace.tokenizer, Record(), self._main.source)
        for cell in cells:
            if cell.size in self._keep:
                checkpoint.check(self._folder.path / cell.name)

    def _is_missing(self, cell: Cell, result: SweepResult) -> bool:
        is_measured = any(row.name == cell.name for row in result.rows)
        return not is_measured or (cell.size in self._keep and not self._folder.has_checkpoint(cell.name))

    def _prune_all(self, cells: Sequence[Cell], meter: Meter, result: SweepResult) -> None:
        """Prune and measure the models of one seed."""
        # The states of a stage depend on all requests, and not only on those that an interrupted sweep has left.
        every = [cell for cell in self._cells if cell.config.seed == cells[0].config.seed]
        seed = cells[0].config.seed
        state = self._folder.state(f"seed-{seed}")
        requests = [dataclasses.replace(cell.config, resume=str(state)) for cell in every]
        needing = [request for request in requests if needs_calibration(request)]
        calibration = self._main.calibration(self._with_most_text(needing)) if needing else None
        if calibration is not None:
            self._folder.check_calibration(result, seed, calibration)
        evidence = self._main.evidence(requests, calibration)
        if len(cells) > 1:
            resume = Resume(state, {"weights": self._digest})
            shelf = shared_dense_stream(self._main.model, [cell.config for cell in cells], calibration, resume)
            evidence = dataclasses.replace(evidence, dense_stream=shelf)
        for method, of_method in groupby(cells, key=lambda cell: cell.config.method):
            scores: Scores | None = None
            for cell in of_method:
                if scores is None or get_method(method).learns_split:
                    same = [other for other in every if other.config.method == method]
                    # Methods that stop early score enough units for the largest removal.
                    scored = cell if get_method(method).learns_split else self._grid.most(same)
                    own = f"{state}-{scored.name}"
                    scores = self._main.score(dataclasses.replace(scored.config, resume=own), evidence)
                self._row(cell, scores, meter, result)

    def _row(self, cell: Cell, scores: Scores, meter: Meter, result: SweepResult) -> None:
        """Prune and measure one model, and store its row."""
        pruning = self._workplace.prunings(None)
        pruning.latencies = self._main.latencies
        pruning.prune(cell.config, None, scores, inplace=False, chosen=())
        record, plan, outcome = pruning.record, pruning.record.plan, pruning.record.outcome
        assert plan is not None and outcome is not None
        figures, comparison = meter.measure(cell.name, pruning.model)
        if cell.size in self._keep:
            record = dataclasses.replace(record, comparison=comparison)
            parts = (pruning.model, self._workplace.tokenizer, record, pruning.source, self._workplace.processor)
            PrunedCheckpoint(*parts).save(self._folder.path / cell.name)
        calibration: dict[str, Any] = dict(scores.calibrated_on)
        if scores.calibration is not None:
            calibration["windows"] = len(scores.calibration)
        row = SweepRow(cell.name, cell.config.to_dict(), figures, outcome.seconds, calibration)
        rows = {other.name: other for other in result.rows} | {row.name: row}
        order = {other.name: place for place, other in enumerate(self._cells)}
        result.rows = sorted(rows.values(), key=lambda other: order.get(other.name, len(order)))
        self._folder.store(result, cell.name, plan)
        announce(f"{len(result.rows)} of {max(len(order), len(rows))} models are measured, the last is {cell.name}.")

    @cached_property
    def _digest(self) -> str:
        """A fingerprint of the model's weights."""
        model = self._main.model
        return digest_of((name, read_parameter(model, name)) for name, _ in model.named_parameters())
