"""Combining two successive prunings of a model into one plan for the dense model, where one plan can express both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..architectures import (
    Site,
    SiteKey,
    get_architecture,
    head_counts,
)
from ..request.choices import AttentionUnit, UnitKind
from .plan import PruningPlan


# The key in a plan's metadata for earlier prunings of the model, a list of JSON objects.
EARLIER = "earlier"

# The metadata of an earlier plan that these objects contain.
REMEMBERED = ("method", "reconstruction", "requested_sparsity", "rounds", "seed", "calibration", "replayed")


@dataclass(frozen=True)
class EarlierPruning:
    """The plan by which a model was pruned, with the information to combine it with the next plan.

    Args:
        plan (`PruningPlan`): the plan for the dense model.
        dense_units (mapping of `str` to `int`): number of attention units in a layer of the dense model, by the kind
            of unit.
        units_now (mapping of site key to `str`): the kind of unit of an attention site in the next pruning.
        recovery (`dict`, *optional*): how the model was trained since.
    """

    plan: PruningPlan
    dense_units: Mapping[str, int]
    units_now: Mapping[SiteKey, str]
    recovery: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan | None, recovery: dict[str, Any] | None
    ) -> EarlierPruning | None:
        """Return the earlier pruning of `model`, or `None` for a dense model, and if its plan is unknown.

        Args:
            model (`PreTrainedModel`): the model that is pruned next.
            sites (sequence of `Site`): its sites, in the units of the next pruning.
            plan (`PruningPlan`, *optional*): the plan by which the model was pruned.
            recovery (`dict`, *optional*): how it was trained since.
        """
        architecture = get_architecture(model.config)
        if plan is None or plan.model_type != architecture.model_type:
            return None
        # A pruned config holds the dense sizes of attention at its top level.
        sizes, attention = model.config.get_text_config().to_dict(), architecture.layout.attention
        heads = sizes[attention.heads_key]
        groups = heads if attention.kv_heads_key is None else sizes[attention.kv_heads_key]
        layers = [layer for _, layer in architecture.layers(model)]
        units_now: dict[SiteKey, str] = {}
        for site in sites:
            if site.kind == UnitKind.ATTENTION:
                is_group = site.num_units == head_counts(attention, layers[site.layer]).kv_heads
                units_now[site.key] = AttentionUnit.KV_GROUP if is_group else AttentionUnit.QUERY_HEAD
        return cls(plan, {AttentionUnit.KV_GROUP: groups, AttentionUnit.QUERY_HEAD: heads}, units_now, recovery)

    def followed_by(self, later: PruningPlan) -> PruningPlan | None:
        """Return the plan for the dense model that combines both prunings.

        `None` is returned where heads were removed in units that one plan cannot express, for example KV groups first
        and then query heads of other groups.
        """
        earlier = {name: self.plan.metadata.get(name) for name in REMEMBERED}
        if self.recovery:
            earlier["recovery"] = self.recovery
        history = [*self.plan.metadata.get(EARLIER, []), earlier]
        later = replace(later, metadata={**later.metadata, EARLIER: history})
        after = self.plan.keys_after()
        for unit in dict.fromkeys((later.attention_unit, self.plan.attention_unit, *AttentionUnit)):
            kept, num_units = {}, {}
            for key in self.plan.kept:
                units = self._in_units(key, after.get(key), later, unit)
                if units is None:
                    break
                kept[key], num_units[key] = units
            else:
                return replace(
                    later, kept=kept, num_units=num_units, model_type=self.plan.model_type, attention_unit=unit
                )
        return None

    def why_apart(self, later: PruningPlan) -> str:
        """Return the message to the user for a later plan that `followed_by` cannot combine with this one."""
        now = {self.units_now[key] for key in later.kept if key.kind == UnitKind.ATTENTION and later.removed(key)}
        return (
            f"The new plan applies only to the pruned model that this pruning started from: attention heads were "
            f"removed in units of {self.plan.attention_unit!r} before and of "
            f"{' and '.join(map(repr, sorted(now)))} now, which one plan for the dense model cannot express. A "
            f"query head that is the only one left with its keys and values is a KV group. Keep both checkpoints to "
            f"replay the plans one after the other."
        )

    def _in_units(
        self, key: SiteKey, now: SiteKey | None, later: PruningPlan, unit: str
    ) -> tuple[list[int], int] | None:
        """Return the units of a site that both plans keep, and the number of its units in the dense model; `None`
        where attention units of the kind `unit` cannot express them.

        Args:
            key (`SiteKey`): the key of the site in the dense model.
            now (`SiteKey`, *optional*): its key in the pruned model; `None` where it was removed.
            later (`PruningPlan`): the plan for the pruned model.
            unit (`str`): the kind of attention units.
        """
        is_attention = key.kind == UnitKind.ATTENTION
        total = self.dense_units[unit] if is_attention else self.plan.num_units[key]
        if now is None or not later.kept[now]:
            return [], total
        before, after = self.plan.kept[key], later.kept[now]
        both = [before[place] for place in after] if len(before) == later.num_units[now] else None
        if not is_attention:
            return (both, total) if both is not None else None
        first, second, wanted = self._kind(self.plan.attention_unit), self.units_now[now], self._kind(unit)
        if not self.plan.removed(key):
            if not later.removed(now):
                return list(range(total)), total
            return (after, total) if second == wanted else None
        if not later.removed(now):
            return (before, total) if first == wanted else None
        return (both, total) if both is not None and first == second == wanted else None

    def _kind(self, unit: str) -> str:
        """Return the kind of a unit in the dense model. Query heads are KV groups if its groups have a single head."""
        same = self.dense_units[AttentionUnit.KV_GROUP] == self.dense_units[AttentionUnit.QUERY_HEAD]
        return AttentionUnit.KV_GROUP if same else unit
