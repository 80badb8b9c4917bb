"""The method of `FwdPruner` that prunes a model to many sizes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..loading.source import Source
from ..planning.latency import LatencyTable
from ..pruning import Pruning
from ..record.record import Record
from ..runs.devices import host_by_default
from ..scoring.methods import PruningConfig
from .grid import Grid
from .measuring import Measures
from .result import SweepResult
from .sweeping import Sweep, Workplace


class Sweeps:
    """A base class of `FwdPruner`, which prunes copies of its model to many sizes."""

    _model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    processor: ProcessorMixin | None
    _record: Record
    _source: Source
    _latencies: LatencyTable | None

    @host_by_default()
    def sweep(
        self,
        folder: str | Path,
        config: PruningConfig | str | None = None,
        dataset: Any = None,
        *,
        measures: Measures | None = None,
        keep: Iterable[float] = (),
        **fields,
    ) -> SweepResult:
        """Prune copies of the model to many sizes and measure them; the model itself is not changed.

        ```python
        print(pruner.sweep("sizes", sparsity=[0.1, 0.2, 0.3], keep=[0.3]))
        ```

        Units are scored once per method and seed, the statistics of all methods are collected in one pass, and the
        dense model's hidden states are computed once for all reconstructions. Each model is measured before the next
        one is made, so that memory holds two models.

        Args:
            folder (`str` or `Path`): folder for the results: `sweep.json` with all figures, the picture `sweep.svg`,
                the plans in `plans/`, and a subfolder per checkpoint. If it holds a sweep of this model, that is
                continued: models that were measured already are not made again.
            config (`PruningConfig` or `str`, *optional*): the request, or the name of a preset.
            dataset (*optional*): calibration text or tokens, which replace `config.calibration`.
            measures (`Measures`, *optional*): the texts to measure loss and divergence on, and what is timed. By
                default these are an eighth more calibration windows, which are not calibrated on.
            keep (iterable of `float`): sizes whose models are saved as checkpoints.
            fields: options of `PruningConfig` by name. One of `sparsity`, `target_parameters`, `target_bytes`,
                `target_memory` and `target_speedup` has a list of sizes; `method`, `seed` and `reconstruction` may
                have lists too.

        Returns:
            `SweepResult`: the figures of every model.

        Raises:
            ValueError: before anything is measured, where a request cannot be met, there are no sizes or two budgets,
                or the folder holds another sweep.
        """

        def prunings(data: Any) -> Pruning:
            return Pruning(self._model, self.tokenizer, data, self._record, self._source, self._latencies)

        workplace = Workplace(prunings, dataset, self.tokenizer, self.processor)
        return Sweep(folder, Grid.of(config, fields), workplace, measures or Measures(), keep).run()
