"""The site of a decoder layer with a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..models.experts import ExpertsLayout
from ..models.layout import DecoderLayout
from ..request.choices import UnitKind
from .coupling import Coupling, Segment
from .routing import Routing
from .site import Site, SiteKey


# Routers with groups of experts rank these by the sum of their two best scores.
FEWEST_OF_A_GROUP = 2


def expert_site(layout: ExpertsLayout, layer_index: int, path: str, layer: nn.Module, config: Any) -> Site:
    """Describe the mixture of a decoder layer.

    Args:
        layout (`ExpertsLayout`): the layout of the family's experts.
        layer_index (`int`): index of the decoder layer.
        path (`str`): name of the layer inside the model.
        layer (`Module`): the layer.
        config (`PreTrainedConfig`): the config of the decoder layers.
    """
    name = f"{path}.{layout.module}"
    mixture: Any = layer.get_submodule(layout.module)
    experts, router = mixture.get_submodule(layout.experts), mixture.get_submodule(layout.router)
    one = (Segment(1),)
    couplings = (
        Coupling(f"{name}.{layout.experts}", experts, 0, one, layout.parameters),
        Coupling(f"{name}.{layout.router}", router, 0, one, layout.router_tensors),
    )
    groups = number_of_groups(layout, config)
    return Site(
        layer=layer_index,
        kind=UnitKind.EXPERT,
        output_name=name,
        output=mixture,
        num_units=len(getattr(experts, layout.parameters[0])),
        couplings=couplings,
        modules=(mixture,),
        num_groups=groups,
        routing=Routing(
            router=router,
            experts=experts,
            experts_name=couplings[0].name,
            chosen=getattr(config, layout.chosen_key),
            fewest=fewest_experts(layout, config),
            correction=layout.correction,
        ),
    )


def number_of_groups(layout: ExpertsLayout, config: Any) -> int:
    """Return the number of groups of experts, 1 where there are none."""
    return 1 if layout.groups_key is None else getattr(config, layout.groups_key) or 1


def fewest_experts(layout: ExpertsLayout, config: Any) -> int:
    """Return the smallest number of experts that the router can choose from.

    The groups that a token chooses from must have as many experts as it chooses, since routers give experts of other
    groups no score.
    """
    chosen = getattr(config, layout.chosen_key)
    if layout.groups_key is None or layout.chosen_groups_key is None:
        return chosen
    chosen_groups = getattr(config, layout.chosen_groups_key) or 1
    return number_of_groups(layout, config) * max(FEWEST_OF_A_GROUP, -(-chosen // chosen_groups))


def values_of_experts(layout: DecoderLayout, config: Any, kept: Mapping[SiteKey, Sequence[int]]) -> dict[str, int]:
    """Return the entry of a config with the number of experts, if the sites of the model keep the units `kept`. It is
    the same for all layers, as check_experts has made sure of; without any mixture, there is none."""
    numbers = {len(units) for key, units in kept.items() if key.kind == UnitKind.EXPERT and len(units)}
    if layout.experts is None or not numbers:
        return {}
    key = layout.experts.count_key
    return {config.attribute_map.get(key, key): numbers.pop()}


def check_experts(sites: Iterable[Site], kept: Mapping[SiteKey, Sequence[int]]) -> None:
    """Raise `ValueError` where layers would keep different numbers of experts, or fewer than their routers need."""
    left = [site for site in sites if site.routing is not None and len(kept[site.key])]
    for site in left:
        number, first = len(kept[site.key]), len(kept[left[0].key])
        if number != first:
            raise ValueError(
                f"The plan keeps {number} experts in layer {site.layer} and {first} in layer {left[0].layer}. All "
                f"layers must keep the same number, which is an entry of the config."
            )
        if number < site.fewest_units:
            raise ValueError(
                f"The plan keeps {number} of {site.num_units} experts in layer {site.layer}, and {why_fewest(site)}. "
                f"The plan must keep at least {site.fewest_units}, or none."
            )


def why_fewest(site: Site) -> str:
    """Return why a site needs its smallest number of experts, as a clause."""
    assert site.routing is not None
    groups = f" from groups, of which there are {site.num_groups}" if site.num_groups > 1 else ""
    return f"a token uses {site.routing.chosen} of them{groups}, so that {site.fewest_units} is the smallest number"
