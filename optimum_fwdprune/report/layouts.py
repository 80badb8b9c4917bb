"""Tables of what a model consists of before it is pruned: its units and the linears of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..allocation.depth import DepthUnit, depth_units
from ..allocation.losses import outside_units
from ..architectures import Site, find_sites, get_architecture
from ..architectures.site import unit_name
from ..architectures.sizes import ModelSizes
from ..request.choices import AttentionUnit, DepthKind, UnitKind
from ..words import render_table


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..architectures.recognition import RecognisedLayout


def units_table(model: PreTrainedModel) -> str:
    """Return tables of the units of a supported model and of the linears that they are parts of, with a sentence on
    what cannot be removed.

    Args:
        model (`PreTrainedModel`): dense or pruned; it may be on the meta device.
    """
    found = units_of(model)
    units = [
        (
            unit["unit"],
            str(unit["sites"]),
            _span(unit["per_site"]),
            _span(unit["parameters_of_one"]),
            f"{unit['parameters']:,}",
            f"{unit['share']:.1%}",
        )
        for unit in found["units"]
    ]
    linears = [
        (linear["name"], _ranges(linear["layers"]), linear["features"], linear["of_a_unit"])
        for linear in found["linears"]
    ]
    return "\n".join(
        [
            render_table(("unit", "sites", "per site", "parameters of one", "of all", "of the model"), units),
            *found["notes"],
            render_table(("linear of a layer", "layers", "features", "of a unit"), linears),
        ]
    )


def units_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the units of a supported model as JSON values.

    Returns:
        `dict`: `parameters` of the model, and `active_parameters`, those that a token uses; `units`, one entry per
        kind of unit: its name (`unit`), the number of `sites`, the different numbers of units `per_site` and of
        `parameters_of_one` unit, the `parameters` of all of them, and their `share` of the model; `linears`, one entry
        per linear and shape: `name`, `layers`, `features`, and how many of them are `of_a_unit`; `notes`, sentences.
    """
    total = ModelSizes.of(model).parameters
    units: list[dict[str, Any]] = []
    for unit in AttentionUnit:
        sites = [site for site in find_sites(model, unit, (UnitKind.ATTENTION,)) if not site.fixed]
        units += _units(sites, unit_name(UnitKind.ATTENTION, unit))
    sites = find_sites(model, AttentionUnit.KV_GROUP)
    for kind in (UnitKind.MLP, UnitKind.EXPERT):
        of_kind = [site for site in sites if site.kind == kind and not site.fixed]
        units += _units(of_kind, unit_name(kind, AttentionUnit.KV_GROUP))
    sublayers = depth_units(sites, DepthKind.SUBLAYER)
    for kind, name in ((UnitKind.ATTENTION, "whole attentions"), (UnitKind.MLP, "whole MLPs")):
        units += _whole([unit for unit in sublayers if unit.sites[0].key.sublayer == kind], name)
    units += _whole(_removable_layers(model, sites), "whole layers")
    active = total - sum(site.idle_parameters for site in sites)
    routed = [f"A token uses {active:,} of the {total:,} parameters ({active / total:.1%})."] if active < total else []
    outside = outside_units(total, sum(site.num_parameters for site in sites), "that can be removed")
    return {
        "parameters": total,
        "active_parameters": active,
        "units": [{**unit, "share": unit["parameters"] / total} for unit in units],
        "linears": _linears(sites),
        "notes": [*filter(None, [outside]), *routed, *_reasons(model, sites)],
    }


def _removable_layers(model: PreTrainedModel, sites: Sequence[Site]) -> list[DepthUnit]:
    if _normalizes_stream(model):
        return []
    return [unit for unit in depth_units(sites, DepthKind.LAYER) if not unit.sites[0].layer_stays]


def _normalizes_stream(model: PreTrainedModel) -> bool:
    return get_architecture(model.config).layout.normalizes_stream(model.config.get_text_config())


def _reasons(model: PreTrainedModel, sites: Sequence[Site]) -> list[str]:
    """Return sentences on what cannot be removed from a model."""
    named: dict[str, str] = {UnitKind.ATTENTION: "head", UnitKind.MLP: "channel"}
    fixed = dict.fromkeys((site.kind, site.fixed) for site in sites if site.fixed)
    sentences = [f"No single {named[kind]} can be removed: {reason}" for kind, reason in fixed]
    staying = sorted({site.layer for site in sites if site.layer_stays})
    if _normalizes_stream(model):
        sentences.append("No whole layer can be removed: the layers normalize the residual stream itself.")
    elif staying:
        sentences.append(f"The layers {_ranges(staying)} cannot be removed whole.")
    return sentences


def _whole(units: Sequence[DepthUnit], name: str) -> list[dict[str, Any]]:
    """Return the entry of the layers or sublayers; none where none can be removed."""
    if not units:
        return []
    sizes = [sum(site.all_parameters for site in unit.sites) for unit in units]
    numbers = {"sites": len(units), "per_site": [1], "parameters_of_one": sorted(set(sizes))}
    return [{"unit": name, **numbers, "parameters": sum(sizes)}]


def _units(sites: Sequence[Site], name: str) -> list[dict[str, Any]]:
    """Return the entry of one kind of unit; none where no site has it."""
    if not sites:
        return []
    return [
        {
            "unit": name,
            "sites": len(sites),
            "per_site": sorted({site.num_units for site in sites}),
            "parameters_of_one": sorted({site.unit_parameters for site in sites}),
            "parameters": sum(site.num_parameters for site in sites),
        }
    ]


def _linears(sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Return one entry per linear, or other tensor that units are parts of, and shape that it has in some layers."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for site in sites:
        for coupling in site.couplings:
            name = coupling.name.partition(f".{site.layer}.")[2]
            for tensor_name, tensor in () if coupling.is_linear else coupling.own_tensors():
                share = f"{coupling.owned_width()} of {tensor.shape[coupling.axis]}"
                shape = " x ".join(map(str, tensor.shape))
                layers.setdefault((f"{name}.{tensor_name}", shape, share), []).append(site.layer)
            if not coupling.is_linear:
                continue
            inputs, outputs = coupling.linear.in_features, coupling.linear.out_features
            cut = f"{outputs} outputs" if coupling.axis == 0 else f"{inputs} inputs"
            features, share = f"{inputs} -> {outputs}", f"{coupling.owned_width()} of {cut}"
            layers.setdefault((name, features, share), []).append(site.layer)
    return [
        {"name": name, "layers": numbers, "features": features, "of_a_unit": share}
        for (name, features, share), numbers in layers.items()
    ]


def linears_table(layout: RecognisedLayout) -> str:
    """Return a table of the linears of a decoder layer, with what each was recognised to be."""
    rows = [(name, str(shape), layout.role(name)) for name, shape in layout.linears.items()]
    return render_table((f"linear of {layout.layers}.0", "features", "recognised as"), rows)


def _span(values: Sequence[int]) -> str:
    """Return one number, or the lowest and the highest of several, which ascend."""
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as ranges: 0-29, or 0-3, 7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
