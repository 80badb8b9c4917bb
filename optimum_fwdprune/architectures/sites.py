"""The sites of a loaded model's layers, and the sizes of a layer after units are removed, both from its layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..models.experts import SAME_WIDTH
from ..models.layout import AttentionLayout, DecoderLayout, MLPLayout, has_submodule
from ..request.choices import AttentionUnit, UnitKind
from .coupling import Coupling, Segment
from .experts import expert_site
from .site import HeadNorm, Site
from .transposed import TransposedLinear, as_linear


class HeadCounts(NamedTuple):
    """The numbers of heads of an attention module.

    Args:
        heads (`int`): number of query heads.
        kv_heads (`int`): number of key/value heads.
    """

    heads: int
    kv_heads: int


def head_counts(layout: AttentionLayout, layer: nn.Module) -> HeadCounts:
    """Return the numbers of heads of a decoder layer by the sizes of its linears, which hold for pruned layers too."""
    module: Any = layer.get_submodule(layout.module)
    head_dim = getattr(module, layout.head_dim)
    heads = as_linear(module.get_submodule(layout.output)).in_features // head_dim
    if not (layout.query or layout.fused):
        return HeadCounts(heads, heads)
    if not layout.fused:
        return HeadCounts(heads, module.get_submodule(layout.key).out_features // head_dim)
    fused_heads = as_linear(module.get_submodule(layout.fused)).out_features // head_dim
    return HeadCounts(heads, (fused_heads - heads) // 2)


def attention_site(layout: AttentionLayout, layer_index: int, path: str, layer: nn.Module, unit: str) -> Site:
    """Describe the attention of a decoder layer.

    Args:
        layout (`AttentionLayout`): the layout of the family's heads.
        layer_index (`int`): index of the decoder layer.
        path (`str`): name of the layer inside the model.
        layer (`Module`): the layer.
        unit (`str`): `"query_head"` or `"kv_group"`.

    Raises:
        ValueError: where the heads are not groups of equally many, so that no attention can be computed.
    """
    module: Any = layer.get_submodule(layout.module)
    heads, kv_heads = head_counts(layout, layer)
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{path}.{layout.module} has {heads} query heads and {kv_heads} KV heads, and the first number must be a "
            f"multiple of the second one. Correct {layout.heads_key} and {layout.kv_heads_key} in the config."
        )
    head_dim, per_group = getattr(module, layout.head_dim), heads // kv_heads
    single_heads = unit == AttentionUnit.QUERY_HEAD and per_group > 1
    query = Segment(head_dim if single_heads else per_group * head_dim)
    # If query heads are units, the kept heads share keys and values, so that no unit owns these.
    shared = Segment(kv_heads * head_dim, owned=False) if single_heads else Segment(head_dim)

    def coupling(name: str, axis: int, *segments: Segment) -> Coupling:
        return Coupling(f"{path}.{layout.module}.{name}", as_linear(module.get_submodule(name)), axis, segments)

    whole: list[Coupling] = []
    sources: list[Coupling] = []
    if layout.query:
        sources.append(coupling(layout.query, 0, query))
        (whole if single_heads else sources).extend(coupling(name, 0, shared) for name in (layout.key, layout.value))
    elif layout.fused and layout.interleaved and single_heads:
        groups = [range(first, first + per_group) for first in range(0, heads, per_group)]
        rows = [(Segment(head_dim, group), Segment(2 * head_dim, owned=False)) for group in groups]
        sources = [coupling(layout.fused, 0, *itertools.chain(*rows))]
    elif layout.fused and layout.interleaved:
        sources = [coupling(layout.fused, 0, Segment((per_group + 2) * head_dim))]
    elif layout.blocks > 1:
        size = heads // layout.blocks
        of_blocks = [Segment(head_dim, range(first, first + size)) for first in range(0, heads, size)]
        # Queries, keys and values of one block after the other.
        sources = [coupling(layout.fused, 0, *(segment for segment in of_blocks for _ in range(3)))]
    elif layout.fused:
        sources = [coupling(layout.fused, 0, query, shared, shared)]
    if layout.per_head:
        heads_of_units = Segment(1 if single_heads else per_group)
        sources.append(Coupling(f"{path}.{layout.module}", module, 0, (heads_of_units,), layout.per_head))
    output = coupling(layout.output, 1, query)
    # Keys that query heads share keep all their weights.
    of_norms = {layout.query_norms: 1 if single_heads else per_group, layout.key_norms: 0 if single_heads else 1}
    return Site(
        layer=layer_index,
        kind=UnitKind.ATTENTION,
        output_name=output.name,
        output=output.linear,
        num_units=heads if single_heads else kv_heads,
        couplings=(*sources, output),
        modules=(module,),
        num_groups=kv_heads if single_heads else layout.blocks,
        shared=tuple(whole),
        norms=tuple(
            HeadNorm(f"{path}.{layout.module}.{name}", module.get_submodule(name), of_unit)
            for name, of_unit in of_norms.items()
            if of_unit and has_submodule(module, name)
        ),
    )


def mlp_site(layout: MLPLayout, layer_index: int, path: str, layer: Any) -> Site:
    """Describe the MLP of a decoder layer; the arguments are those of `attention_site`.

    Raises:
        ValueError: where it has no channels.
    """
    channel = Segment(1)
    output = Coupling(f"{path}.{layout.output}", as_linear(layer.get_submodule(layout.output)), 1, (channel,))
    if output.linear.in_features < 1:
        raise ValueError(f"{path}.{layout.output} has no channels. Correct {layout.width_key} in the config.")
    sources = [
        Coupling(f"{path}.{name}", as_linear(layer.get_submodule(name)), 0, (channel,) * layout.segments)
        for name in layout.sources
    ]
    return Site(
        layer=layer_index,
        kind=UnitKind.MLP,
        output_name=output.name,
        output=output.linear,
        num_units=output.linear.in_features,
        couplings=(*sources, output),
        modules=tuple(layer.get_submodule(name) for name in layout.modules),
        pointwise=layout.pointwise,
    )


def site_after_attention(layout: DecoderLayout, config: Any, layer_index: int, path: str, layer: Any) -> Site:
    """Describe the MLP of a decoder layer, or the mixture of experts in its place.

    Args:
        layout (`DecoderLayout`): the layout of the family.
        config (`PreTrainedConfig`): the config of the decoder layers.
        layer_index (`int`): index of the decoder layer.
        path (`str`): name of the layer inside the model.
        layer (`Module`): the layer.
    """
    experts = layout.experts
    if experts is not None and experts.is_in(layer):
        return expert_site(experts, layer_index, path, layer, config)
    assert layout.mlp is not None, "Layers without experts have an MLP."
    site = mlp_site(layout.mlp, layer_index, path, layer)
    return site if experts is None else replace(site, fixed=SAME_WIDTH)


def check_couplings(sites: Iterable[Site]) -> None:
    """Raise `ValueError` where units own parts of something that cannot be cut, such as quantized weights."""
    for site in sites:
        for coupling in (*site.couplings, *site.shared):
            module, weights = coupling.module, [tensor for _, tensor in coupling.own_tensors()]
            is_known = not coupling.is_linear or isinstance(module, (nn.Linear, TransposedLinear))
            if not is_known or not all(weight.is_floating_point() for weight in weights):
                raise ValueError(
                    f"{coupling.name} is a {type(module).__name__} with {weights[0].dtype} weights, which cannot be "
                    f"cut. Load the model unquantized."
                )


def attention_sizes(layout: AttentionLayout, layer: nn.Module, site: Site, kept: Sequence[int]) -> dict[str, Any]:
    """Return the config entries of a decoder layer whose attention keeps the units `kept`."""
    heads, kv_heads = head_counts(layout, layer)
    sizes: dict[str, Any] = {layout.heads_key: len(kept) * (heads // site.num_units)}
    if layout.kv_heads_key is not None:
        sizes[layout.kv_heads_key] = len(kept) if site.num_units == kv_heads else kv_heads
    if layout.kept_heads_key is not None:
        ids = getattr(layer.get_submodule(layout.module), "kept_heads", range(heads))
        per_unit = heads // site.num_units
        sizes[layout.kept_heads_key] = [ids[unit * per_unit + head] for unit in kept for head in range(per_unit)]
    return sizes
