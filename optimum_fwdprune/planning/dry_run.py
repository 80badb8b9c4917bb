"""A dry run: what a request would lead to, as far as it can be known before units are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..allocation.plan import PruningPlan
from ..architectures import Site, SiteKey
from ..architectures.site import unit_name
from ..architectures.sizes import ModelSizes
from ..data.calibration import Calibration
from ..forward.memory import Memory
from ..loading.offloading import is_offloaded
from ..loading.subject import Subject
from ..request.choices import ReconstructionKind, Scope, UnitKind
from ..request.config import PruningConfig
from ..runs import ranks
from ..scoring.score_units import check_scoring
from ..words import html_table, render_table
from .calibration_text import described_calibration
from .duration import device_of, estimated_seconds, expected_time
from .forecast import Forecast
from .make_plan import replayed, request_of_replay
from .quality import largest_sparsity
from .serving import Serving
from .settler import Settler
from .settling import kept_by_equal_scores
from .stock_layout import STOCK, check_stock_layout


# Layers are alike where the numbers of units that they keep differ by at most this fraction of the largest, as after
# rounding to multiples.
ALIKE = 0.05


@dataclass(frozen=True)
class DryRun:
    """What a request would lead to, as far as it can be known before units are scored.

    Args:
        request (`PruningConfig`): the request with the defaults that depend on the model.
        sizes (`Forecast`): sizes of the whole model before and after.
        layers (`list[dict]`, *optional*): a row for every layer, with its number as `layer`, and by kind of unit
            `kept`, `units` and `parameters` (`before` and `after`). `None` where the scores decide what each layer
            loses.
        serving_memory (`Memory`, *optional*): memory of the pruned model in bytes, while it serves
            `request.serving_batch` prompts of `request.context_tokens` tokens; `None` where it cannot be predicted.
        run_memory (`dict[str, int]`): bytes of what takes most of the memory while the model is pruned.
        seconds (`dict[str, float]`, *optional*): estimated seconds of the longest stages on this machine; `None` where
            they depend on more than the request and the sizes of the model.
        notes (`list[str]`): sentences on what is decided during the run, and on what a GGUF file requires.
    """

    request: PruningConfig
    sizes: Forecast
    layers: list[dict[str, Any]] | None
    serving_memory: Memory | None
    run_memory: dict[str, int]
    seconds: dict[str, float] | None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [str(self.sizes), *self.notes, "", *self._sentences()]
        if self.layers is not None:
            parts.append(render_table(*self._table()))
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        from html import escape

        sentences = [*str(self.sizes).splitlines(), *self.notes, *self._sentences()]
        text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
        return text + (html_table(*self._table()) if self.layers is not None else "")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        memory = self.serving_memory
        return {
            "request": self.request.to_dict(),
            **self.sizes.to_dict(),
            "layers": self.layers,
            "serving_memory": None
            if memory is None
            else {
                "weights": memory.weights,
                "cache": memory.cache,
                "activations": memory.activations,
                "total": memory.total,
                "batch_size": self.request.serving_batch,
                "tokens": self.request.context_tokens,
            },
            "run_memory": {**self.run_memory, "total": sum(self.run_memory.values())},
            "seconds": None if self.seconds is None else {**self.seconds, "total": sum(self.seconds.values())},
            "notes": self.notes,
        }

    def _sentences(self) -> list[str]:
        request, sentences = self.request, []
        if self.serving_memory is not None:
            prompts = f"{request.serving_batch} x {request.context_tokens} tokens"
            sentences.append(f"While it serves {prompts}, the pruned model will take {self.serving_memory}.")
        # On an accelerator, hidden states wait in the memory of the host.
        names = {"hidden_states": "hidden states in the memory of the host"}
        parts = {names.get(name, name.replace("_", " ")): size / 1e6 for name, size in self.run_memory.items() if size}
        listed = ", ".join(f"{size:,.0f} MB of {name}" for name, size in parts.items())
        sentences.append(f"The run takes at least {sum(parts.values()):,.0f} MB: {listed}.")
        sentences.append(expected_time(self.seconds))
        return sentences

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        assert self.layers is not None
        kinds = [kind for kind in UnitKind if any(kind in row for row in self.layers)]
        names = (name for kind in kinds for name in (unit_name(kind, self.request.attention_unit), "parameters"))
        return ("layer", *names), [tuple(_cells(rows, kinds)) for rows in _alike(self.layers, kinds)]


def _alike(rows: Sequence[dict[str, Any]], kinds: Sequence[UnitKind]) -> list[list[dict[str, Any]]]:
    """Return the rows of the layers, with neighbours that differ by no more than rounding in one list."""
    groups: list[list[dict[str, Any]]] = []
    for row in rows:
        if groups and all(_range_of(kind, [*groups[-1], row]) is not None for kind in kinds):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _range_of(kind: UnitKind, rows: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
    """Return the least and the largest number of units that layers keep; `None` where they are not alike."""
    if kind not in rows[0]:
        # A mixture of experts is in the place of the MLP of some layers, and a pruned layer may lack a sublayer.
        return None if any(kind in row for row in rows) else (0, 0)
    if not all(kind in row for row in rows):
        return None
    kept, units = [row[kind]["kept"] for row in rows], {row[kind]["units"] for row in rows}
    least, most = min(kept), max(kept)
    if len(units) > 1 or most - least > ALIKE * most or (least < most == max(units)):
        return None
    return least, most


def _cells(rows: Sequence[dict[str, Any]], kinds: Sequence[UnitKind]) -> Iterator[str]:
    """Yield the cells of layers that are alike: their numbers, and for every kind the units that each keeps of all,
    and the parameters that are left of each."""
    yield _written([row["layer"] for row in rows], "{}", "-")
    for kind in kinds:
        if kind not in rows[0]:
            yield from ("", "")
            continue
        yield f"{_written([row[kind]['kept'] for row in rows], '{}')} / {rows[0][kind]['units']}"
        yield _written([row[kind]["parameters"]["after"] for row in rows])


def _written(numbers: Sequence[int], form: str = "{:,}", separator: str = " to ") -> str:
    """Return a number, or the least and the largest of several."""
    return separator.join(form.format(number) for number in sorted({min(numbers), max(numbers)}))


def foreseen(
    subject: Subject,
    settler: Settler,
    config: PruningConfig,
    plan: PruningPlan | None,
    calibration: Calibration | None,
) -> DryRun:
    """Return what a request would lead to.

    Args:
        subject (`Subject`): the model with all its sites, which may be on the meta device; it has passed the checks of
            `planning/checks.py`.
        settler (`Settler`): settles requests for the model.
        config (`PruningConfig`): the request.
        plan (`PruningPlan`, *optional*): plan to replay.
        calibration (`Calibration`, *optional*): the calibration tokens; `None` where none are needed.
    """
    sites, notes = subject.sites, []
    if plan is not None:
        kept, sizes = plan.kept, settler.foreseen_of_plan(replayed(plan, config), config)
        if config.layout == STOCK:
            check_stock_layout(subject, plan, config.reconstruction)
        config = request_of_replay(plan, config)
    else:
        if config.limits_of_quality:
            (limit,) = config.limits_of_quality
            notes.append(
                f"The run measures {limit}={getattr(config, limit)} and chooses the size by it. These are the sizes "
                f"of the smallest model that it can make."
            )
            config = _smallest(settler, config, limit)
        config, budget, sizes, costs = settler.foreseen(config)
        notes += costs
        kept = kept_by_equal_scores(sites, config, budget)
        if subject.streamed or not is_offloaded(subject.model):
            check_scoring(subject.model, config)
    if calibration is not None:
        notes.append(described_calibration(subject.model, config, calibration))
    return DryRun(
        request=config,
        sizes=sizes,
        layers=_rows(sites, kept) if _is_decided(config, plan) else None,
        serving_memory=_serving_memory(subject, config, kept),
        run_memory=_run_memory(subject, config, kept, 0 if calibration is None else calibration.num_tokens),
        seconds=estimated_seconds(subject, config, kept, calibration, device_of(subject), ranks.world_size()),
        notes=notes,
    )


def _smallest(settler: Settler, config: PruningConfig, limit: str) -> PruningConfig:
    """Return the request with the largest possible sparsity instead of its limit of quality."""

    def of(sparsity: float) -> PruningConfig:
        changes: dict[str, Any] = {limit: None, "sparsity": sparsity}
        return replace(config, **changes)

    return of(largest_sparsity(lambda sparsity: settler.settled(of(sparsity), may_remove_layers=False)))


def _rows(sites: Sequence[Site], kept: Mapping[SiteKey, Sequence[int]]) -> list[dict[str, Any]]:
    """Return a row for every layer with what its sites keep; see [`DryRun`]."""
    rows: dict[int, dict[str, Any]] = {}
    for site in sites:
        left = len(kept[site.key])
        parameters = {"before": site.num_units * site.unit_parameters, "after": left * site.unit_parameters}
        row = rows.setdefault(site.layer, {"layer": site.layer})
        row[str(site.kind)] = {"kept": left, "units": site.num_units, "parameters": parameters}
    return list(rows.values())


def _is_decided(config: PruningConfig, plan: PruningPlan | None) -> bool:
    """Return whether the numbers of units that every layer keeps do not depend on scores."""
    if plan is not None:
        return True
    return config.resolved_scope == Scope.LAYER and config.depth_kind is None and config.rounds == 1


def _serving_memory(subject: Subject, config: PruningConfig, kept: Mapping[SiteKey, Sequence[int]]) -> Memory | None:
    """Return the memory of the model that keeps these units while it serves; `None` where it cannot be predicted."""
    try:
        return Serving(subject, config).memory(kept)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def _run_memory(
    subject: Subject, config: PruningConfig, kept: Mapping[SiteKey, Sequence[int]], tokens: int
) -> dict[str, int]:
    """Return bytes of what takes most of the memory of a run, by name.

    Args:
        subject (`Subject`): the dense model.
        config (`PruningConfig`): the settled request.
        kept (mapping of site key to sequence of `int`): the units that it keeps, or as many of them.
        tokens (`int`): number of calibration tokens; 0 where none is needed.
    """
    model, layers = subject.model, subject.layers
    weights = ModelSizes.of(model).bytes
    if subject.streamed:
        # One decoder layer is in memory at a time.
        sizes = [ModelSizes.of(layer).bytes for layer in layers]
        weights += max(sizes) - sum(sizes)
    refits = config.reconstruction == ReconstructionKind.LEAST_SQUARES and tokens > 0
    # The dense stream, that of the pruned model, and the outputs of the dense layer.
    streams = 3 if refits else 1
    hidden = tokens * subject.text_config.hidden_size * model.dtype.itemsize * streams
    widest = max((len(kept[site.key]) * site.unit_width for site in subject.sites if site.routing is None), default=0)
    outputs = subject.text_config.hidden_size
    # Two sums over tokens in float32, and a matrix, its factor and the solution in float64.
    fit = (2 * 4 * (widest + outputs) * widest + 8 * (2 * widest + 2 * outputs) * widest) if refits else 0
    return {"weights": weights, "hidden_states": hidden, "least_squares": fit}
