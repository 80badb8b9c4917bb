"""Pruning plans: the units that a pruned model keeps. Surgery needs a plan and the dense weights only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..architectures.depth import layers_left
from ..architectures.site import (
    Site,
    SiteKey,
    keyed_by_site,
    unit_name,
)
from ..files import as_path, write_text_atomically
from ..request.choices import AttentionUnit, UnitKind
from ..words import html_table


PLAN_NAME = "fwdprune_plan.json"

# The entries that a file must have, besides metadata.
_KEYS = {"format", "model_type", "attention_unit", "num_units", "kept"}

# Numbers of units in a file are limited, since an unlimited number could exhaust memory.
MOST_UNITS = 2**24


@dataclass(frozen=True)
class PruningPlan:
    """Which units every site keeps.

    A plan can be inspected, edited (`dataclasses.replace`), saved as JSON, and replayed on the same dense model.

    Args:
        kept (`dict[tuple[int, str], list[int]]`): site, as `(layer, "attention")`, `(layer, "mlp")` or
            `(layer, "expert")`, to the sorted indices of the units that are kept. A sublayer without units is removed,
            and so is a layer without sublayers.
        num_units (`dict[tuple[int, str], int]`): number of units of every site before pruning.
        model_type (`str`): `config.model_type` of the model that the plan was made for.
        attention_unit (`str`): the kind of attention units, `"kv_group"` or `"query_head"`.
        metadata (`dict`, *optional*): how the plan was made, as JSON values; surgery does not read them.

    Raises:
        ValueError: where units are no integers, unsorted, repeated or out of range.
    """

    kept: dict[SiteKey, list[int]]
    num_units: dict[SiteKey, int]
    model_type: str
    attention_unit: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.kept.keys() != self.num_units.keys():
            raise ValueError("kept and num_units must name the same sites.")
        for name, kind_of_value in (("model_type", str), ("metadata", dict)):
            if not isinstance(getattr(self, name), kind_of_value):
                raise ValueError(f"{name} must be a {kind_of_value.__name__}; got {getattr(self, name)!r}.")
        if self.attention_unit not in list(AttentionUnit):
            raise ValueError(f"attention_unit must be one of {', '.join(AttentionUnit)}; got {self.attention_unit!r}.")
        for key, units in self.kept.items():
            (layer, kind), total = key, self.num_units[key]
            # JSON allows true and 1.5, which Python would accept as numbers of units.
            if not isinstance(units, (list, tuple)) or any(type(number) is not int for number in (total, *units)):
                raise ValueError(f"Layer {layer} {kind}: units are a list of integers; got {units} of {total}.")
            if total > MOST_UNITS:
                raise ValueError(
                    f"Layer {layer} {kind}: the plan has {total} units; at most {MOST_UNITS} are allowed."
                )
            if list(units) != sorted(set(units)) or not all(0 <= unit < total for unit in units):
                raise ValueError(
                    f"Layer {layer} {kind}: kept units must be sorted, different and in [0, {total}); got {units}."
                )
        # Lists are what a file contains, and what torch accepts as an index along one axis, unlike tuples.
        object.__setattr__(self, "kept", {key: list(units) for key, units in keyed_by_site(self.kept).items()})
        object.__setattr__(self, "num_units", keyed_by_site(self.num_units))

    def _repr_html_(self) -> str:
        rows, kinds = [], self.kinds
        for layer in sorted({layer for layer, _ in self.kept}):
            row = [str(layer)]
            for kind in kinds:
                key = SiteKey(layer, kind)
                total, kept = self.num_units.get(key, 0), len(self.kept.get(key, []))
                gone = total and not kept
                row += [f"{kept} / {total}", "removed" if gone else f"{kept / total if total else 1:.0%}"]
            rows.append(row)
        names = (name for kind in kinds for name in (unit_name(kind, self.attention_unit), ""))
        return html_table(("layer", *names), rows)

    @property
    def kinds(self) -> list[str]:
        """The kinds of its sites: attention, and MLP channels, experts or both, in this order."""
        present = {key.kind for key in self.kept}
        return [kind for kind in UnitKind if kind in present]

    def removed(self, key: SiteKey) -> list[int]:
        """Return the units of a site that are removed, sorted."""
        return sorted(set(range(self.num_units[key])) - set(self.kept[key]))

    def followed_by(self, later: PruningPlan) -> PruningPlan:
        """Return this plan combined with `later`, which is for the pruned model; it has the metadata of `later`."""
        after = self.keys_after()
        kept = {
            key: [units[unit] for unit in later.kept[after[key]]] if key in after else []
            for key, units in self.kept.items()
        }
        return replace(self, kept=kept, metadata=later.metadata)

    def keys_after(self) -> dict[SiteKey, SiteKey]:
        """Return the sites that keep a unit, with their keys in the pruned model, whose layers are renumbered."""
        numbers = {layer: number for number, layer in enumerate(layers_left(self.kept))}
        return {key: SiteKey(numbers[key.layer], key.kind) for key, units in self.kept.items() if units}

    def check_left(self, sites: Iterable[Site]) -> None:
        """Raise `ValueError` where the sites of a pruned model are not those that the plan keeps."""
        counts = {site.key: site.num_units for site in sites}
        planned = {after: len(self.kept[key]) for key, after in self.keys_after().items()}
        for key in sorted(counts.keys() | planned.keys()):
            layer, kind = key
            if counts.get(key) != planned.get(key):
                raise ValueError(
                    f"Layer {layer} {kind}: the plan keeps {planned.get(key, 'no such site')}, and the weights next "
                    f"to it have {counts.get(key, 'no such site')}. The plan was edited, or belongs to another "
                    f"checkpoint."
                )

    def check_matches(self, sites: Iterable[Site], model_type: str) -> None:
        """Raise `ValueError` where the plan was made for a model with other sites."""
        sites = list(sites)
        if model_type != self.model_type:
            raise ValueError(
                f"The plan is for a {self.model_type!r} model, and this model is {model_type!r}. "
                f"{self._way_out(model_type)}"
            )
        if {site.key for site in sites} != self.kept.keys():
            raise ValueError(
                f"The plan names {len(self.kept)} sites and the model has {len(sites)}: it was made for another model."
            )
        for site in sites:
            kept, planned = self.kept[site.key], self.num_units[site.key]
            if planned != site.num_units:
                raise ValueError(
                    f"The plan was made for another model: it has {planned} units in the {site}, and the model has "
                    f"{site.num_units}. Replay a plan on the model that it was made for."
                )
            per_group = site.num_units // site.num_groups
            counts = [0] * site.num_groups
            for unit in kept:
                counts[unit // per_group] += 1
            if len(set(counts)) > 1:
                raise ValueError(
                    f"The plan keeps {counts} {_in_groups(site)} in the {site}; every group of a layer must keep the "
                    f"same number."
                )
        for kind, what in ((None, "layer"), (UnitKind.ATTENTION, "layer with attention")):
            if not any(units for key, units in self.kept.items() if kind in (None, key.kind)):
                raise ValueError(f"The plan keeps no {what}. It must keep at least one.")

    def _way_out(self, model_type: str) -> str:
        """Return how a plan for another type of model can be used."""
        if self.model_type == f"pruned_{model_type}":
            return "It is for a model that was pruned before: replay the plan of that pruning first."
        if model_type == f"pruned_{self.model_type}":
            source = self.metadata.get("source")
            name = f", {source}," if source else ""
            return f"It is for the dense model{name} and includes all prunings: replay it on that model."
        return "Replay a plan on the model that it was made for."

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON to the file `path`, or into the folder `path`."""
        path = _plan_file(path)
        document = {
            "format": 1,
            "model_type": self.model_type,
            "attention_unit": self.attention_unit,
            "num_units": _nest(self.num_units),
            "kept": _nest(self.kept),
            "metadata": self.metadata,
        }
        # A line per site, since a line per number would make the file long.
        text = re.sub(r"\[[\d,\s]*\]", lambda match: " ".join(match[0].split()), json.dumps(document, indent=1))
        write_text_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan from the file `path`, or from the checkpoint folder `path`.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: where the file is not a plan; the message names it.
        """
        path = _plan_file(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no plan {path}. Pass the folder of a pruned checkpoint, or its {PLAN_NAME}."
            )
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(document, dict) or not document.keys() >= _KEYS:
                raise ValueError(f"it must be a JSON object with {', '.join(sorted(_KEYS))}")
            if document["format"] != 1:
                raise ValueError(f"its format is {document['format']!r}, and only format 1 is supported")
            return cls(
                kept=_flatten(document["kept"]),
                num_units=_flatten(document["num_units"]),
                model_type=document["model_type"],
                attention_unit=document["attention_unit"],
                metadata=document.get("metadata", {}),
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a pruning plan: {_why(error)}. Pass the folder of a pruned checkpoint, or its "
                f"{PLAN_NAME}."
            ) from error


def _in_groups(site: Site) -> str:
    return "query heads per KV group" if site.kind == UnitKind.ATTENTION else "experts per group"


def _why(error: Exception) -> str:
    """Return the reason why a file cannot be read as a plan."""
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return f"it is not JSON ({error})"
    if isinstance(error, (KeyError, ValueError)):
        return str(error.args[0]).rstrip(".")
    return f"its entries are not those of a plan ({error})"


def _plan_file(path: str | Path) -> Path:
    path = as_path(path, "path")
    return path / PLAN_NAME if path.is_dir() else path


def _nest(values: Mapping[SiteKey, Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for (layer, kind), value in values.items():
        nested.setdefault(str(layer), {})[kind] = value
    return nested


def _flatten(nested: Mapping[str, Mapping[str, Any]]) -> dict[SiteKey, Any]:
    unknown = {kind for entry in nested.values() for kind in entry} - set(UnitKind)
    if unknown:
        raise KeyError(f"unknown kinds {sorted(unknown)}")
    return {SiteKey(int(layer), kind): value for layer, entry in nested.items() for kind, value in entry.items()}
