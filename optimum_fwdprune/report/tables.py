"""Tables for a terminal: the kept units of each layer, the history of learning, and a comparison of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..allocation.losses import depth_losses, rerouted
from ..allocation.plan import PruningPlan
from ..architectures.site import SiteKey, unit_name
from ..request.choices import WIDTH_KINDS
from ..words import render_table
from .document import kinds_of, models_of
from .learning import learning_of
from .numbers import figure_label, figure_way, is_quality, is_speed, written


if TYPE_CHECKING:
    from torch import Tensor


def plan_table(plan: PruningPlan) -> str:
    """Return a table of what each layer kept."""
    layers = sorted({layer for layer, _ in plan.kept})
    rows = []
    for layer in layers:
        row = [str(layer)]
        for kind in plan.kinds:
            key = SiteKey(layer, kind)
            total, kept = plan.num_units.get(key, 0), len(plan.kept.get(key, []))
            share = kept / total if total else 1.0
            share_text = f"{'removed':<25}" if total and not kept else f"{'█' * round(share * 20):<20} {share:4.0%}"
            row += [f"{kept} / {total}", share_text]
        rows.append(tuple(row))
    header = ("layer", *(name for kind in plan.kinds for name in (unit_name(kind, plan.attention_unit), "")))
    sentences = [*depth_losses(plan.kept).values(), rerouted(plan)]
    return "\n".join([render_table(header, rows), *filter(None, sentences)])


def plan_figures(plan: PruningPlan) -> dict[str, Any]:
    """Return what each layer kept as JSON values: `model_type`, `method` and `source` of the plan, and a row per layer
    in `layers`, with its number as `layer`, and `kept` and `units` by kind."""
    rows: dict[int, dict[str, Any]] = {}
    for key in sorted(plan.kept):
        row = rows.setdefault(key.layer, {"layer": key.layer})
        row[str(key.kind)] = {"kept": len(plan.kept[key]), "units": plan.num_units[key]}
    names = {name: plan.metadata.get(name) for name in ("method", "source")}
    return {"model_type": plan.model_type, **names, "layers": list(rows.values())}


def report_table(document: Mapping[str, Any]) -> str:
    """Return the tables of a report: one that compares all checkpoints, then those of each checkpoint.

    Args:
        document (mapping): the report, as [`~optimum_fwdprune.report.document.document_of`] returns it.
    """
    models = models_of(document)
    parts = [_side_by_side(document, models)] if len(document["checkpoints"]) > 1 else []
    for checkpoint in document["checkpoints"]:
        parts.append(_checkpoint(checkpoint))
    if not any(model["figures"] for model in models):
        parts.append(
            "Perplexity and speed were not measured. --dense MODEL --text FILE measures them, and --compare FILE.json "
            "reads what `fwdprune compare` measured."
        )
    return "\n\n".join(parts)


def history_table(history: Mapping[str, Tensor], rows: int = 10) -> str:
    """Return a table of how masks were learned, with a row per stretch of equally many steps.

    Args:
        history (mapping of `str` to `Tensor[steps]`): the history of [`Scores`].
        rows (`int`, defaults to 10): largest number of rows.

    Raises:
        ValueError: where there is no history, because the method does not learn, or took no step.
    """
    learning = learning_of(history, rows)
    lines = []
    for place, last in enumerate(learning["steps"]):
        first = 1 + (learning["steps"][place - 1] if place else 0)
        rates = []
        for kind in WIDTH_KINDS:
            now = [values[place] for values in learning["keep_rates"][kind].values()]
            rates.append(f"{min(now):.2f} to {max(now):.2f}" if now else "")
        loss = learning["loss"][place]
        lines.append(
            (
                f"{first} to {last}",
                "nan" if loss is None else f"{loss:.3f}",
                f"{learning['entropy'][place]:.3f}" if learning["entropy"] else "",
                f"{learning['expected_sparsity'][place]:.1%}" if learning["expected_sparsity"] else "",
                *rates,
            )
        )
    header = ("steps", "expected loss", "entropy, bits", "sparsity", "kept heads per layer", "kept channels per layer")
    return render_table(header, lines)


def _side_by_side(document: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for model in models for name in model["figures"]))
    names = [name for name in names if is_quality(name) or is_speed(name)]
    rows = []
    for model in models:
        sizes = None if model["is_dense"] else document["checkpoints"][model["at"][1]]["sizes"]
        parameters = sizes["parameters"]["after"] if sizes else model["figures"].get("parameters")
        rows.append(
            (
                f"{model['number']} {model['name']}",
                written(parameters, "millions"),
                *(written(sizes[key]["change"], "change") if sizes else "" for key in ("parameters", "prunable")),
                *(written(model["figures"].get(name), figure_way(name)) for name in names),
            )
        )
    return render_table(("", "parameters", "removed", "of the prunable", *map(figure_label, names)), rows)


def _checkpoint(checkpoint: Mapping[str, Any]) -> str:
    title = f"{checkpoint['number']} {checkpoint['name']}: {checkpoint['source'] or 'a dense model'} pruned by "
    sections = [title + (checkpoint["method"] or "hand")]
    rows = [*_sizes(checkpoint["sizes"]), *_measured(checkpoint["measured"])]
    sections.append(render_table(("", "before", "after", "change"), rows) if rows else "Sizes were not recorded.")
    if outside := (checkpoint["sizes"] or {}).get("outside"):
        sections.append(outside)
    kinds = kinds_of(checkpoint)
    names = (name for kind in kinds for name in (unit_name(kind, checkpoint["attention_unit"]), "parameters"))
    layers = [
        (str(row["layer"]), *(text for kind in kinds for text in _site(row[kind]))) for row in checkpoint["layers"]
    ]
    sections.append(render_table(("layer", *names), layers))
    sections.append("\n".join(filter(None, [*checkpoint["depth"], checkpoint["routing"]])))
    if checkpoint["command"]:
        sections.append(f"Made by: {checkpoint['command']}")
    if checkpoint["training"]:
        sections.append(checkpoint["training"].replace("`", ""))
    sections += ["\n".join(note.replace("`", "") for note in checkpoint["command_notes"])]
    return "\n\n".join(filter(None, sections))


def _sizes(sizes: Mapping[str, Any] | None) -> Iterator[tuple[str, ...]]:
    ways = {"parameters": "count", "prunable": "count", "bytes": "megabytes"}
    for key, name in (("parameters", "parameters"), ("prunable", "prunable parameters"), ("bytes", "weights")):
        if sizes:
            before, after = (written(sizes[key][when], ways[key]) for when in ("before", "after"))
            yield name, before, after, written(sizes[key]["change"], "change")


def _measured(measured: Mapping[str, Any] | None) -> Iterator[tuple[str, ...]]:
    figures = measured["pruned"]["figures"] if measured else {}
    dense = measured["dense"]["figures"] if measured and measured["dense"] else {}
    for name, value in figures.items():
        # The rows of sizes show these.
        if not name.endswith("standard error") and name not in ("parameters", "weights, bytes"):
            before = dense.get(name)
            is_ratio = is_speed(name) or not before or isinstance(before, str) or isinstance(value, str)
            ratio = "" if is_ratio else written(value / before, "times")
            way = figure_way(name)
            yield figure_label(name), written(before, way), written(value, way), ratio


def _site(site: Mapping[str, Any]) -> tuple[str, str]:
    if site["units"] and not site["kept"]:
        return f"0 / {site['units']}", "removed"
    left = (site["parameters"] or {}).get("after")
    return f"{site['kept']} / {site['units']}", written(left, "count", "not recorded")
