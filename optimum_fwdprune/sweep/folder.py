"""The folder of a sweep: the rows so far, plans, checkpoints, and the states of interrupted stages."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..allocation.plan import PruningPlan
from ..data.calibration import Calibration
from ..files import as_path
from ..request.files import VERSION_KEY
from ..runs import ranks
from ..runs.loggers import get_logger
from ..words import first_difference
from .grid import Cell, Grid
from .result import FILE, SweepResult


logger = get_logger(__name__)

# The subfolder with the states of interrupted stages, which is removed at the end, and that with the plans.
STATE, PLANS = "state", "plans"
PICTURE = "sweep.svg"


class SweepFolder:
    """The folder of a sweep. If there are several processes, the main one reads and writes it.

    Args:
        path (`str` or `Path`): the folder, which need not exist.
        grid (`Grid`): the requests of the sweep.
    """

    def __init__(self, path: str | Path, grid: Grid):
        self.path = as_path(path, "folder").expanduser().absolute()
        self._grid = grid

    def _stored(self) -> SweepResult | None:
        """Return the result that the folder holds, or `None`."""

        def load() -> SweepResult | None:
            return SweepResult.load(self.path) if (self.path / FILE).exists() else None

        stored: SweepResult | None = ranks.from_main(load)
        return stored

    def continued(self, identity: dict[str, Any]) -> SweepResult:
        """Return the result in the folder, or a new one, which the folder holds from then on.

        Args:
            identity (`dict`): what the sweeps must have in common, as JSON values.

        Raises:
            ValueError: where the folder holds another sweep; the message names the difference.
        """
        stored = self._stored()
        if stored is None:
            result = SweepResult(self._grid.budget, identity, {})
            ranks.from_main(lambda: result.save(self.path))
            return result
        mine = {"budget": self._grid.budget, **json.loads(json.dumps(identity))}
        if difference := first_difference({"budget": stored.budget, **stored.identity}, mine):
            raise self._of_another_sweep(f": {difference}")
        return stored

    def cells(self, result: SweepResult) -> list[Cell]:
        """Return the requests of the sweep; those with a row have its name.

        Raises:
            ValueError: where a row has the name of another request; the message names the difference.
        """
        cells, requests = [], {row.name: _material(row.request) for row in result.rows}
        for cell in self._grid.cells:
            request = _material(cell.config.to_dict())
            done = next((name for name, other in requests.items() if other == request), None)
            if done is None and cell.name in requests:
                difference = first_difference(requests[cell.name], request)
                raise self._of_another_sweep(f", whose {cell.name} had another request: {difference}")
            cells.append(replace(cell, name=done or cell.name))
        return cells

    def check_calibration(self, result: SweepResult, seed: int, calibration: Calibration) -> None:
        """Raise `ValueError` where the rows of a seed were calibrated on other tokens."""
        for row in result.rows:
            before = row.calibration.get("fingerprint")
            if row.request["seed"] == seed and before not in (None, calibration.fingerprint):
                raise self._of_another_sweep(
                    f", whose {row.name} was calibrated on tokens {before}, and these are {calibration.fingerprint}"
                )

    def has_checkpoint(self, name: str) -> bool:
        """Return whether the checkpoint of this name is there."""
        return (self.path / name / "config.json").exists()

    def state(self, name: str) -> Path:
        """Return the folder for the states of a stage of these requests."""
        requests = json.dumps([cell.config.to_dict() for cell in self._grid.cells], sort_keys=True)
        return self.path / STATE / hashlib.sha256(requests.encode()).hexdigest()[:12] / name

    def store(self, result: SweepResult, name: str, plan: PruningPlan) -> None:
        """Write the result so far, and the plan of the model of this name."""

        def write() -> None:
            (self.path / PLANS).mkdir(exist_ok=True)
            plan.save(self.path / PLANS / f"{name}.json")
            result.save(self.path)

        ranks.from_main(write)

    def finish(self, result: SweepResult) -> None:
        """Draw the result, unless matplotlib is not installed, and remove the states of stages."""

        def write() -> None:
            try:
                result.plot(self.path / PICTURE)
            except ImportError as error:
                logger.warning("The sweep has no picture. %s", error)
            shutil.rmtree(self.path / STATE, ignore_errors=True)

        ranks.from_main(write)

    def _of_another_sweep(self, how: str) -> ValueError:
        return ValueError(f"{self.path} holds another sweep{how}. Name another folder, or delete it to start again.")


def _material(request: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a request that change its result, as JSON values."""
    left_out = ("batch_size", VERSION_KEY)
    return {name: value for name, value in json.loads(json.dumps(request)).items() if name not in left_out}
