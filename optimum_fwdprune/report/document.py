"""The content of a report as JSON values, from which its page, tables and pictures are made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..allocation.losses import depth_losses, outside_units, rerouted
from ..allocation.plan import PLAN_NAME, PruningPlan
from ..architectures import find_sites
from ..architectures.site import SiteKey
from ..evaluation import Comparison
from ..loading.configs import read_config
from ..record.outcome import Outcome
from ..record.reading import skeleton_of, with_outcome
from ..record.record import Record
from ..record.reproduction import reproduction_of
from ..request.choices import AttentionUnit, DepthKind, UnitKind
from ..scoring.scores import Scores
from ..version import __version__
from .learning import learning_of
from .routing import routing_of
from .sentences import how_it_was_trained


BINS = 32
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
# Scores that span more orders of magnitude than this are shown on a logarithmic axis.
DECADES = 2


def document_of(checkpoints: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a report, as JSON values, of checkpoints as [`describe`] returns them."""
    numbered = [{"number": number, **checkpoint} for number, checkpoint in enumerate(checkpoints, 1)]
    return {"format": 1, "made_by": f"optimum-fwdprune {__version__}", "checkpoints": numbered}


def models_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the models of a report in the order of its tables: first the dense models, then the checkpoints.

    Args:
        document (mapping): the report, as [`document_of`] returns it.

    Returns:
        `list[dict]`: `number`, a checkpoint's own or `D` for the dense model; `name`; `is_dense`; `figures`, empty
        where nothing was measured; `at`, the path of these figures in the document.
    """
    dense: list[dict[str, Any]] = []
    pruned: list[dict[str, Any]] = []
    for place, checkpoint in enumerate(document["checkpoints"]):
        measured = checkpoint["measured"] or {"dense": None, "pruned": {"figures": {}}}
        where = ["checkpoints", place, "measured"]
        reference = measured["dense"]
        if reference and not any(reference["figures"] == model["figures"] for model in dense):
            dense.append({"number": "D", "is_dense": True, **reference, "at": [*where, "dense", "figures"]})
        own = {"number": str(checkpoint["number"]), "name": checkpoint["name"], "is_dense": False}
        figures = dict(measured["pruned"]["figures"])
        pruned.append({**own, "figures": figures, "at": [*where, "pruned", "figures"]})
        if figures and checkpoint["sizes"]:
            figures.setdefault("parameters", checkpoint["sizes"]["parameters"]["after"])
    if len(dense) > 1:
        dense = [{**model, "number": f"D{place}"} for place, model in enumerate(dense, 1)]
    return dense + pruned


def describe_checkpoint(
    model_id: str | Path, comparison: Comparison | None = None, name: str | None = None, **hub_kwargs
) -> dict[str, Any]:
    """Return the record of a pruned checkpoint as JSON values; see [`describe`]. No weight is read.

    Args:
        model_id (`str` or `Path`): folder, or repository of the Hub.
        comparison (`Comparison`, *optional*): measurements, the dense model first and this one last; by default those
            in the checkpoint itself.
        name (`str`, *optional*): name to show; by default the folder's or the repository's.
        hub_kwargs: `revision`, `token`, `cache_dir`, `trust_remote_code` and the like.

    Raises:
        ValueError: where this is no pruned checkpoint, or a file in it is damaged; the message names the file.
        OSError: where there is no such folder or repository.
    """
    path = Path(model_id)
    if path.is_file():
        raise ValueError(f"{path} is a file; name the folder of a pruned checkpoint, or its repository.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: it is no checkpoint, or an incomplete one.")
    where = {key: value for key, value in hub_kwargs.items() if key != "trust_remote_code"}
    record = Record.of_checkpoint(model_id, **where)
    if record.plan is None and not path.exists():
        try:
            read_config(model_id, **hub_kwargs)
        except OSError as error:
            raise OSError(f"There is no folder {model_id}, and no repository that can be read: {error}") from error
    if record.plan is None:
        raise ValueError(f"{model_id} has no {PLAN_NAME}: it is dense, or was pruned with another tool.")
    try:
        config = read_config(model_id, **hub_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json of {model_id} is not JSON: {error}.") from error
    model = skeleton_of(config)
    try:
        record.plan.check_left(find_sites(model, record.plan.attention_unit))
    except ValueError as error:
        raise ValueError(f"{model_id}: {error}") from error
    name = name or (path.name if path.exists() else str(model_id))
    return describe(name, with_outcome(record, model), comparison or record.comparison)


def kinds_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the kinds of units in the layers of a checkpoint, as [`describe`] returns it."""
    rows = checkpoint["layers"] or [{}]
    return [kind.value for kind in UnitKind if kind in rows[0]]


def describe(name: str, record: Record, comparison: Comparison | None = None) -> dict[str, Any]:
    """Return the record of a pruned model as JSON values; `None` stands for what is not known.

    Args:
        name (`str`): name to show.
        record (`Record`): request, plan, scores and figures.
        comparison (`Comparison`, *optional*): measurements: first the dense model, if any, and this model last.
    """
    plan, config, scores, outcome = record.plan, record.config, record.scores, record.outcome
    metadata = plan.metadata if plan else {}
    calibration = metadata.get("calibration")
    made = reproduction_of(record, outcome.calibration if outcome else (calibration or {}).get("source"))
    return {
        "name": name,
        "source": metadata.get("source"),
        "model_type": plan.model_type if plan else None,
        "method": metadata.get("method") or (config.method if config else None),
        "reconstruction": metadata.get("reconstruction") or (config.reconstruction if config else None),
        "attention_unit": plan.attention_unit if plan else str(AttentionUnit.QUERY_HEAD),
        "calibration": {name: calibration.get(name) for name in ("source", "fingerprint")} if calibration else None,
        "seed": metadata.get("seed"),
        "rounds": metadata.get("rounds"),
        "versions": metadata.get("versions"),
        "request": config.to_dict() if config else None,
        "command": made.command if made else None,
        "command_notes": made.notes if made else [],
        "recovery": record.recovery,
        "training": " ".join(how_it_was_trained(record)) or None,
        "sizes": _sizes(outcome) if outcome else None,
        "pruning": _pruning(outcome) if outcome else None,
        "depth": list(depth_losses(plan.kept).values()) if plan else [],
        "routing": rerouted(plan) if plan else None,
        "routing_by_layer": routing_of(plan) if plan else [],
        "layers": _layers(plan, outcome) if plan else None,
        "scores": _scores(scores, plan) if scores else None,
        "depth_scores": _depth_scores(scores, plan) if scores else [],
        "learning": _learning(scores),
        "measured": measured_of(comparison),
    }


def measured_of(comparison: Comparison | None) -> dict[str, Any] | None:
    """Return every figure of the last model of a comparison, and of the first one where it has several models."""
    if comparison is None:
        return None
    models = [
        # JSON has no NaN and no infinity, which a broken model measures.
        {
            "name": Path(evaluation.name).name,
            "figures": {
                name: value if value is None or math.isfinite(value) else str(value) for name, value in figures.items()
            },
        }
        for evaluation, figures in zip(comparison.evaluations, comparison.figures())
    ]
    return {"dense": models[0] if len(models) > 1 else None, "pruned": models[-1]}


def _sizes(outcome: Outcome) -> dict[str, Any]:
    prunable = outcome.prunable_parameters
    return {
        "parameters": _change(outcome.parameters_before, outcome.parameters_after),
        "prunable": _change(prunable, prunable - outcome.removed_parameters),
        "bytes": _change(outcome.bytes_before, outcome.bytes_after),
        "requested_sparsity": outcome.requested_sparsity,
        "outside": outside_units(outcome.parameters_before, prunable),
    }


def _change(before: float, after: float) -> dict[str, float]:
    return {"before": before, "after": after, "change": after / before - 1}


def _pruning(outcome: Outcome) -> dict[str, Any]:
    figures = outcome.to_dict()
    return {name: figures[name] for name in ("masked_difference", "seconds", "speedup")}


def _layers(plan: PruningPlan, outcome: Outcome | None) -> list[dict[str, Any]]:
    per_unit = outcome.unit_parameters if outcome else {}
    rows = []
    for layer in sorted({layer for layer, _ in plan.kept}):
        row: dict[str, Any] = {"layer": layer}
        for kind in plan.kinds:
            key = SiteKey(layer, kind)
            kept, units, size = len(plan.kept.get(key, [])), plan.num_units.get(key, 0), per_unit.get(key)
            parameters = None if size is None else {"before": units * size, "after": kept * size}
            row[str(kind)] = {"kept": kept, "units": units, "parameters": parameters}
        rows.append(row)
    return rows


def _scores(scores: Scores, plan: PruningPlan | None) -> dict[str, Any]:
    """Return by kind a histogram of the scores, and the quantiles of every layer's scores.

    After several rounds the scores are those of the last round. The plan numbers the dense model's units, not those of
    that round, so that the histogram does not distinguish kept and removed units.
    """
    spreads: dict[str, Any] = {}
    for kind in UnitKind:
        values = {key: value.double().numpy() for key, value in sorted(scores.values.items()) if key.kind == kind}
        if not values:
            continue
        everything = np.concatenate(list(values.values()))
        is_log = bool(everything.min() > 0 and np.log10(everything.max() / everything.min()) > DECADES)
        edges = np.geomspace if is_log else np.linspace
        low, high = float(everything.min()), float(everything.max())
        places = edges(low, high if high > low else low + 1, BINS + 1)
        places[0], places[-1] = low, max(high, places[-1])
        same_numbers = plan is not None and all(plan.num_units.get(key) == len(value) for key, value in values.items())
        if same_numbers:
            assert plan is not None
            kept = np.concatenate([np.isin(np.arange(len(value)), plan.kept[key]) for key, value in values.items()])
            parts = {"kept": everything[kept], "removed": everything[~kept]}
        else:
            parts = {"all": everything}
        spreads[str(kind)] = {
            "is_log": is_log,
            "edges": places.tolist(),
            **{name: np.histogram(part, places)[0].tolist() for name, part in parts.items()},
            "layers": [
                {"layer": key.layer, **{name: float(np.quantile(value, at)) for name, at in QUANTILES.items()}}
                for key, value in values.items()
            ],
        }
    return spreads


def _depth_scores(scores: Scores, plan: PruningPlan | None) -> list[dict[str, Any]]:
    """Return the score of every layer or sublayer, with its kind, `"layer"`, `"attention"` or `"mlp"`, and layer.

    After several rounds, whether it was removed is `None`: the last round numbers the layers that were left.
    """
    sites_of: dict[str, tuple[str, list[str]]] = {DepthKind.LAYER: (DepthKind.LAYER, list(UnitKind))}
    sites_of |= {f"{kind}_{DepthKind.SUBLAYER}": (kind, [kind]) for kind in UnitKind}
    rows = []
    for key, value in sorted(scores.values.items()):
        if key.kind in sites_of:
            kind, parts = sites_of[key.kind]
            removed = None
            if plan is not None and plan.metadata.get("rounds") == 1:
                removed = not any(plan.kept.get(SiteKey(key.layer, part)) for part in parts)
            rows.append({"kind": str(kind), "layer": key.layer, "score": float(value), "removed": removed})
    return rows


def _learning(scores: Scores | None) -> dict[str, Any] | None:
    if scores is None or "loss" not in scores.history or not len(scores.history["loss"]):
        return None
    return {"is_search": "search" in scores.details, **learning_of(scores.history)}
