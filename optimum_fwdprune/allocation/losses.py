"""What a plan removes, as sentences: layers, sublayers, and the units of sublayers that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..architectures.depth import layers_left
from ..architectures.site import SiteKey, unit_name
from ..models.layout import SUBLAYERS
from ..request.choices import AttentionUnit, DepthKind, UnitKind
from .plan import PruningPlan


# The key in the metadata of a plan for the numbers of calibration tokens that are routed to every expert.
ROUTING = "routing"

# Parameters outside of units are named where they are a larger share of the model.
LARGE_SHARE = 1 / 3

ATTENTION_NAMES: dict[str, str] = {AttentionUnit.QUERY_HEAD: "attention heads", AttentionUnit.KV_GROUP: "KV groups"}


def losses_by_kind(
    kept: Mapping[SiteKey, Sequence[int]], num_units: Mapping[SiteKey, int], attention_unit: str
) -> dict[str, str]:
    """Return sentences on what is removed, by kind: whole layers, sublayers, and heads and channels.

    Shares of heads and channels refer to the sublayers that are kept.

    Args:
        kept (mapping of site key to sequence of `int`): the units that are kept.
        num_units (mapping of site key to `int`): number of units before pruning.
        attention_unit (`str`): the kind of attention units, `"kv_group"` or `"query_head"`.
    """
    sentences = depth_losses(kept)
    for kind in UnitKind:
        sites = [key for key in sorted(num_units) if key.kind == kind]
        left = [key for key in sites if kept[key]]
        if not left:
            continue
        total, remaining = sum(num_units[key] for key in left), sum(len(kept[key]) for key in left)
        layers = {key.layer: 1 - len(kept[key]) / num_units[key] for key in left}
        by_layer = {layer: share for layer, share in layers.items() if share}
        name = _capitalised(losses_name(kind, attention_unit)) + (
            " of the other layers" if len(left) < len(sites) else ""
        )
        if not by_layer:
            sentences[kind] = f"{name}: none is removed."
            continue
        least, most = min(by_layer, key=by_layer.__getitem__), max(by_layer, key=by_layer.__getitem__)
        whole = [layer for layer in layers if layer not in by_layer]
        if f"{by_layer[least]:.1%}" != f"{by_layer[most]:.1%}":
            shares = f", from {by_layer[least]:.1%} in layer {least} to {by_layer[most]:.1%} in layer {most}"
        elif whole or len(by_layer) == 1:
            shares = f", {by_layer[most]:.1%} in {layers_named(by_layer)}"
        else:
            shares = " in every layer"
        rest = f", none in {layers_named(whole)}" if whole else ""
        sentences[kind] = f"{name}: {1 - remaining / total:.1%} are removed{shares}{rest}."
    return sentences


def dense_routing(plan: PruningPlan) -> dict[SiteKey, list[int]]:
    """Return the numbers of calibration tokens that the routers of the dense model sent to every expert, by site.

    Sites without experts that are kept, and counts of a model that had lost experts before, are left out.
    """
    routing = {SiteKey.parse(name): counts for name, counts in (plan.metadata.get(ROUTING) or {}).items()}
    return {
        key: counts
        for key, counts in routing.items()
        if plan.kept.get(key) and plan.num_units[key] == len(counts) and sum(counts)
    }


def outside_units(parameters: int, prunable: int, kinds: str = "of the kinds that are pruned") -> str | None:
    """Return a sentence on the parameters that no unit owns, such as embeddings; `None` where they are at most a third
    of all, so that the share of the prunable parameters tells how much smaller the model becomes.

    Args:
        parameters (`int`): parameters of the dense model.
        prunable (`int`): parameters that units own.
        kinds (`str`, *optional*): which units these are, in words.
    """
    outside = 1 - prunable / parameters
    if outside <= LARGE_SHARE:
        return None
    return f"{outside:.1%} of the model's parameters belong to no unit {kinds}, such as its embeddings."


def rerouted(plan: PruningPlan) -> str | None:
    """Return a sentence on the choices of experts that have to change since their experts are removed; `None` where
    the routing of calibration tokens was not counted, or only after an earlier pruning."""
    shares: dict[int, float] = {}
    lost = total = 0
    for key, counts in dense_routing(plan).items():
        of_layer = sum(counts) - sum(counts[expert] for expert in plan.kept[key])
        shares[key.layer] = of_layer / sum(counts)
        lost, total = lost + of_layer, total + sum(counts)
    if not lost:
        return None
    most = max(shares, key=shares.__getitem__)
    return (
        f"Of the experts that the routers chose for the calibration tokens, {lost / total:.1%} are removed, most in "
        f"layer {most} ({shares[most]:.1%}). Other experts take their place."
    )


def losses_name(kind: str, attention_unit: str) -> str:
    """Return the name of units of a kind, in the plural, in sentences on what is removed."""
    return ATTENTION_NAMES[attention_unit] if kind == UnitKind.ATTENTION else unit_name(kind, attention_unit)


def depth_losses(kept: Mapping[SiteKey, Sequence[int]]) -> dict[str, str]:
    """Return sentences on the layers and sublayers that a plan removes, by kind; empty where it removes none."""
    layers, sublayers = removed_depth(kept)
    total = len({layer for layer, _ in kept})
    sentences: dict[str, str] = {}
    if layers:
        verb = "is" if len(layers) == 1 else "are"
        sentences[DepthKind.LAYER] = f"{len(layers)} of {total} layers {verb} removed: {layers_named(layers)}."
    parts = []
    for kind, numbers in sublayers.items():
        name = "attention" if kind == UnitKind.ATTENTION else "MLP" if len(numbers) == 1 else "MLPs"
        parts.append(f"the {name} of {layers_named(numbers)}")
    if parts:
        plural = len(parts) > 1 or len(sublayers.get(UnitKind.MLP, ())) > 1
        text = f"{' and '.join(parts)} {'are' if plural else 'is'} removed."
        sentences[DepthKind.SUBLAYER] = _capitalised(text)
    return sentences


def removed_depth(kept: Mapping[SiteKey, Sequence[int]]) -> tuple[list[int], dict[str, list[int]]]:
    """Return the numbers of the layers that a plan removes, and by kind those of layers that lose one sublayer only.

    Args:
        kept (mapping of site key to sequence of `int`): the units that are kept, by site of the dense model.
    """
    left = set(layers_left(kept))
    layers = sorted({layer for layer, _ in kept} - left)
    sublayers: dict[str, list[int]] = {}
    for kind in SUBLAYERS:
        numbers = sorted(key.layer for key, units in kept.items() if key.sublayer == kind and not units)
        if numbers := [layer for layer in numbers if layer in left]:
            sublayers[kind] = numbers
    return layers, sublayers


def layers_named(layers: Iterable[int]) -> str:
    """Return layers as text, with neighbours as ranges: "layers 0, 1 and 4 to 27"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [
        part
        for run in runs
        for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(layer) for layer in run])
    ]
    if len(parts) == 1:
        return f"layer{'s' * (' to ' in parts[0])} {parts[0]}"
    return f"layers {', '.join(parts[:-1])} and {parts[-1]}"


def _capitalised(name: str) -> str:
    return name[0].upper() + name[1:]
