"""The result of a sweep: a row of figures for every model, as JSON, as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import as_path, write_text_atomically
from ..report.canvas import as_html
from ..report.fronts import Panel, Point, plot_fronts
from ..report.numbers import figure_label, figure_way, written
from ..version import __version__
from ..words import html_table, render_table


FILE = "sweep.json"
FORMAT = 1

PERPLEXITY, DIVERGENCE, FASTER = "perplexity, ", "divergence, ", ", times as fast"


@dataclass(frozen=True)
class SweepRow:
    """The measurements of one model of a sweep.

    Args:
        name (`str`): its name; a kept checkpoint is in the subfolder of this name.
        request (`dict`): its request, as `PruningConfig.to_dict` returns it.
        figures (`dict[str, float]`): what was measured, by name and unit: sizes, perplexities, divergences from the
            dense model in nats per token, times, and speed-ups over the dense model.
        seconds (`dict[str, float]`): time by stage, without the scoring and statistics that rows share.
        calibration (`dict[str, Any]`): source, fingerprint and number of the calibration windows; empty where there
            were none.
    """

    name: str
    request: dict[str, Any]
    figures: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)


@dataclass
class SweepResult:
    """All measurements of a sweep; `print` shows them as a table.

    Args:
        budget (`str`): the option with the sizes.
        identity (`dict`): what a sweep must have in common with this one to continue it, as JSON values.
        dense (`dict[str, float]`): figures of the dense model.
        rows (`list[SweepRow]`): one per model, in the order of the sweep.
    """

    budget: str
    identity: dict[str, Any]
    dense: dict[str, float]
    rows: list[SweepRow] = field(default_factory=list)

    def front(self, quality: str, against: str) -> list[SweepRow]:
        """Return the rows on the Pareto front: no other row is at least as good in both figures and better in one.

        Args:
            quality (`str`): a figure of which lower values are better, such as `"perplexity, wikitext2"`.
            against (`str`): `"parameters"` or another size, of which lower values are better, or a speed-up, of which
                higher values are better.

        Raises:
            ValueError: where a figure was not measured.
        """
        for name in (quality, against):
            if self.rows and not any(name in row.figures for row in self.rows):
                known = ", ".join(repr(known) for known in self.rows[0].figures)
                raise ValueError(f"{name!r} was not measured; the figures are {known}.")
        sign = -1 if against.endswith(FASTER) else 1
        points = {
            row.name: (sign * row.figures[against], row.figures[quality])
            for row in self.rows
            if quality in row.figures and against in row.figures
        }

        def is_beaten(own: tuple[float, float]) -> bool:
            return any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in points.values())

        return [row for row in self.rows if row.name in points and not is_beaten(points[row.name])]

    def plot(self, file: str | Path) -> None:
        """Write a picture of quality against size and, if it was measured, speed, with the Pareto fronts.

        Args:
            file (`str` or `Path`): picture to write; its ending (.svg, .png, .pdf) determines the format.

        Raises:
            ValueError: where there are no rows, or matplotlib has no format for the ending.
            ImportError: where matplotlib is not installed.
        """
        if not self.rows:
            raise ValueError("The sweep has no rows to draw yet.")
        names = list(self.rows[0].figures)
        speeds = [name for name in names if name.endswith(FASTER)]
        panels = [
            self._panel(quality, against)
            for quality in (name for name in names if name.startswith(PERPLEXITY))
            for against in ("parameters", *speeds[-1:])
        ]
        plot_fronts(panels, file)

    def _panel(self, quality: str, against: str) -> Panel:
        on_front = {row.name for row in self.front(quality, against)}
        scale, label = (1e-6, "parameters, millions") if against == "parameters" else (1.0, against)
        points = [
            Point(
                self._series(row),
                f"{row.request[self.budget]:g}",
                scale * row.figures[against],
                row.figures[quality],
                row.name in on_front,
            )
            for row in self.rows
            if quality in row.figures and against in row.figures
        ]
        dense = (1.0 if against.endswith(FASTER) else scale * self.dense[against], self.dense[quality])
        return Panel(points, dense, label, quality)

    def _series(self, row: SweepRow) -> str:
        """Return the name of the requests that differ from a row's in their size and seed only."""
        parts = [
            str(row.request[name])
            for name in ("method", "reconstruction")
            if len({str(other.request[name]) for other in self.rows}) > 1
        ]
        return ", ".join(parts) or str(row.request["method"])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        made_by = f"optimum-fwdprune {__version__}"
        return {
            "format": FORMAT,
            "made_by": made_by,
            "budget": self.budget,
            "identity": self.identity,
            "dense": self.dense,
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, folder: str | Path) -> None:
        """Write `sweep.json` into a folder."""
        file = as_path(folder, "folder") / FILE
        write_text_atomically(file, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> SweepResult:
        """Read the result of a sweep from its folder.

        Raises:
            FileNotFoundError: where the folder holds no sweep.
            ValueError: where the file is damaged, or of a later version.
        """
        file = as_path(folder, "folder") / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {FILE}; `optimum-cli fwdprune sweep` writes one.")
        try:
            return cls._of(json.loads(file.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not the result of a sweep: {type(error).__name__}: {error}.") from error

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> SweepResult:
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']}, and this version reads {FORMAT}")
        rows = [SweepRow(**row) for row in values["rows"]]
        return cls(str(values["budget"]), dict(values["identity"]), dict(values["dense"]), rows)

    def __str__(self) -> str:
        return render_table(*self._table())

    def _repr_html_(self) -> str:
        is_drawn = any(name.startswith(PERPLEXITY) for row in self.rows for name in row.figures)
        return html_table(*self._table()) + (as_html(self.plot, "Quality against size") if is_drawn else "")

    def _table(self) -> tuple[list[str], list[list[str]]]:
        known = dict.fromkeys(name for row in self.rows for name in row.figures) or self.dense
        shown = (lambda name: name.startswith(PERPLEXITY), lambda name: name.startswith(DIVERGENCE))
        faster = [name for name in known if name.endswith(FASTER)]
        names = [
            "parameters",
            "weights, bytes",
            *(name for is_one in shown for name in filter(is_one, known)),
            *faster,
        ]
        quality = next((name for name in names if name.startswith(PERPLEXITY)), None)
        front = {row.name for row in self.front(quality, "parameters")} if quality and self.rows else set()
        rows = [["dense", *(written(self.dense.get(name), figure_way(name), "") for name in names), ""]]
        for row in self.rows:
            cells = (written(row.figures.get(name), figure_way(name), "") for name in names)
            # The header need not name the budget, which all rows have.
            rows.append([row.name.replace(f"{self.budget}-", ""), *cells, "yes" if row.name in front else ""])
        return [self.budget, *map(figure_label, names), "on front"], rows
