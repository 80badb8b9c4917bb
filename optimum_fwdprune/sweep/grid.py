"""The grid of a sweep: one request for every combination of sizes, methods, seeds and reconstructions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..request.axes import BUDGETS, OTHERS
from ..request.budget_options import LIMITS
from ..request.config import method_of
from ..scoring.methods import PruningConfig, get_method


@dataclass(frozen=True)
class Cell:
    """One request of a sweep.

    Args:
        name (`str`): a name that is unique in the sweep and can be that of a folder.
        size (`float`): the value of the budget.
        config (`PruningConfig`): the request.
    """

    name: str
    size: float
    config: PruningConfig


@dataclass(frozen=True)
class Grid:
    """All requests of a sweep.

    Args:
        budget (`str`): the option with the sizes.
        cells (`list[Cell]`): the requests, those of one seed and one method after each other.
    """

    budget: str
    cells: list[Cell]

    @classmethod
    def of(cls, request: PruningConfig | str | None, fields: Mapping[str, Any]) -> Grid:
        """Return the grid of all combinations of the values of `fields`.

        Args:
            request (`PruningConfig` or `str`, *optional*): the request that the fields override, or a preset.
            fields (mapping): options by name. A budget, `method`, `seed` and `reconstruction` may have lists.

        Raises:
            TypeError, ValueError: where there are no sizes or two budgets, a value occurs twice, or a combination is
                no valid request.
        """
        asked = [name for name in BUDGETS if fields.get(name) is not None]
        others = (*(name for name in BUDGETS if name != "sparsity"), *LIMITS)
        own = [name for name in others if getattr(request, name, None) is not None or fields.get(name) is not None]
        if len({*asked, *own}) > 1:
            raise ValueError(f"{' and '.join(dict.fromkeys([*asked, *own]))} are two budgets; set one of them.")
        if not asked:
            raise ValueError(
                f"A sweep needs sizes, such as sparsity=[0.1, 0.2, 0.3]; {', '.join(BUDGETS)} can have several values."
            )
        (budget,) = asked
        if getattr(request, "resume", None) is not None or fields.get("resume") is not None:
            raise ValueError("A sweep resumes from the states in its own folder; leave out resume.")
        axes = {name: _values(name, fields[name]) for name in (*OTHERS, budget) if fields.get(name) is not None}
        single = {name: value for name, value in fields.items() if name not in axes}
        _check_owned(single, methods_of(request, fields))
        cells = []
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values))
            shown = [name for name in axes if len(axes[name]) > 1 or name == budget]
            options = _owned(single, chosen.get("method") or _method_of(request, fields)) | chosen
            if isinstance(request, PruningConfig) and chosen.get("method") == request.method:
                options.pop("method")
            config = PruningConfig.of(request, **options)
            label = "-".join(_shown(name, getattr(config, name)) for name in shown)
            cells.append(Cell(label, getattr(config, budget), config))
        return cls(budget, cells)

    def mapped(self, change: Callable[[PruningConfig], PruningConfig]) -> Grid:
        """Return the grid with `change` applied to every request."""
        return Grid(self.budget, [dataclasses.replace(cell, config=change(cell.config)) for cell in self.cells])

    def most(self, cells: Iterable[Cell]) -> Cell:
        """Return the cell that removes most."""
        return (max if BUDGETS[self.budget] else min)(cells, key=lambda cell: cell.size)

    def check_sizes(self, keep: Iterable[float]) -> None:
        """Raise `ValueError` where a value is none of the sizes."""
        sizes = {cell.size for cell in self.cells}
        for size in keep:
            if size not in sizes:
                listed = ", ".join(f"{value:g}" for value in sorted(sizes))
                raise ValueError(f"keep={size:g} is none of the sizes of this sweep, which are {listed}.")


def _values(name: str, values: Any) -> list[Any]:
    """Return the values of an option as a list."""
    listed = list(values) if isinstance(values, (list, tuple)) else [values]
    if not listed:
        raise ValueError(f"{name} has no value; name at least one.")
    for value in listed:
        if listed.count(value) > 1:
            raise ValueError(f"{name} names {value} twice.")
    return listed


def methods_of(request: PruningConfig | str | None, fields: Mapping[str, Any]) -> list[str]:
    """Return the methods of a sweep; the arguments are those of [`Grid.of`]."""
    return _values("method", fields["method"]) if fields.get("method") is not None else [_method_of(request, fields)]


def _method_of(request: PruningConfig | str | None, fields: Mapping[str, Any]) -> str:
    if isinstance(request, PruningConfig):
        return request.method
    return method_of(request, {"kinds": fields["kinds"]} if "kinds" in fields else {})


def _check_owned(options: Mapping[str, Any], methods: Iterable[str]) -> None:
    """Raise `TypeError` where an option belongs to none of the methods."""
    for name, value in options.items():
        if all(name not in _owned(options, method) for method in methods):
            # The request of any of the methods names the owner of the option.
            PruningConfig(next(iter(methods)), **{name: value})


def _owned(options: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the options that all methods share, and those of one method."""
    known = {declared.name for declared in dataclasses.fields(get_method(method).config_class)}
    return {name: value for name, value in options.items() if name in known}


def _shown(name: str, value: Any) -> str:
    return str(value) if name in ("method", "reconstruction") else f"{name}-{value:g}"
