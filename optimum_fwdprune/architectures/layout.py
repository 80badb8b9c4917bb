"""Declarative descriptions of where a decoder layer keeps its heads and channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .site import ATTENTION, MLP, QUERY_HEAD, Coupling, Segment, Site


@dataclass(frozen=True)
class AttentionLayout:
    """Names of the linears of a self-attention module, and the config keys of its sizes.

    Args:
        module (`str`): name of the attention module inside the decoder layer; it has a `head_dim` attribute.
        output (`str`): name of the output projection inside it.
        query (`str`): name of the query projection, where the three are separate.
        key (`str`): name of the key projection.
        value (`str`): name of the value projection.
        fused (`str`): instead of them, the name of one linear that makes all three.
        interleaved (`bool`, defaults to `False`): the fused rows are `[head, 3, head_dim]` (BLOOM) rather than all
            query rows, then all key rows, then all value rows (Phi-3).
        heads_key (`str`, defaults to `"num_attention_heads"`): config key of the number of query heads.
        kv_heads_key (`str`, *optional*, defaults to `"num_key_value_heads"`): likewise of KV heads; `None` where every
            head has its own keys and values.
        kept_heads_key (`str`, *optional*): config key for the original ids of the kept heads, for models whose heads
            differ by their position (ALiBi). The pruned attention module carries them as `kept_heads`.
    """

    module: str
    output: str
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str = ""
    interleaved: bool = False
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = "num_key_value_heads"
    kept_heads_key: str | None = None

    def site(self, layer_index: int, path: str, layer: nn.Module, unit: str) -> Site:
        """Describe the attention site of `layer`, whose name inside the model is `path`."""
        module: Any = layer.get_submodule(self.module)
        heads, kv_heads = self._head_counts(module)
        head_dim, per_group = module.head_dim, heads // kv_heads
        single_heads = unit == QUERY_HEAD and per_group > 1
        num_units = heads if single_heads else kv_heads
        query = Segment(head_dim if single_heads else per_group * head_dim)
        # With single query heads as units, keys and values are shared by heads that stay: nobody owns them.
        shared = Segment(kv_heads * head_dim, owned=False) if single_heads else Segment(head_dim)

        def coupling(name: str, axis: int, *segments: Segment) -> Coupling:
            return Coupling(f"{path}.{self.module}.{name}", module.get_submodule(name), axis, segments)

        whole: list[Coupling] = []
        if not self.fused:
            sources = [coupling(self.query, 0, query)]
            (whole if single_heads else sources).extend(coupling(name, 0, shared) for name in (self.key, self.value))
        elif self.interleaved:
            sources = [coupling(self.fused, 0, Segment(3 * head_dim))]
        else:
            sources = [coupling(self.fused, 0, query, shared, shared)]
        output = coupling(self.output, 1, query)
        return Site(
            layer=layer_index,
            kind=ATTENTION,
            projection_name=output.name,
            projection=output.linear,
            num_units=num_units,
            couplings=(*sources, output),
            num_groups=kv_heads if single_heads else 1,
            shared=tuple(whole),
        )

    def sizes(self, layer: nn.Module, site: Site, kept: Sequence[int]) -> dict:
        """Return the config entries of the layer once only the units `kept` of `site` are left."""
        module: Any = layer.get_submodule(self.module)
        heads, kv_heads = self._head_counts(module)
        heads_per_unit = heads // site.num_units
        sizes: dict[str, Any] = {self.heads_key: len(kept) * heads_per_unit}
        if self.kv_heads_key is not None:
            sizes[self.kv_heads_key] = len(kept) if site.num_units == kv_heads else kv_heads
        if self.kept_heads_key is not None:
            ids = getattr(module, "kept_heads", range(heads))
            sizes[self.kept_heads_key] = [ids[head] for head in kept]
        return sizes

    def kv_heads(self, layer: nn.Module) -> int:
        """Return the number of key/value heads of a layer."""
        return self._head_counts(layer.get_submodule(self.module))[1]

    def _head_counts(self, module: Any) -> tuple[int, int]:
        """Query heads and key/value heads, read off the linears so that pruned layers are described as they are."""
        heads = module.get_submodule(self.output).in_features // module.head_dim
        if not self.fused:
            return heads, module.get_submodule(self.key).out_features // module.head_dim
        fused_heads = module.get_submodule(self.fused).out_features // module.head_dim
        return heads, (fused_heads - heads) // 2


@dataclass(frozen=True)
class MLPLayout:
    """Names of the linears of an MLP inside the decoder layer, and the config key of its width.

    Args:
        sources (`tuple[str, ...]`): linears whose output rows are channels (`gate_proj` and `up_proj`, or `fc1`).
        output (`str`): the projection back to the hidden size.
        segments (`int`, defaults to 1): 2 where one source holds gate rows and then up rows.
        width_key (`str`, defaults to `"intermediate_size"`): config key of the number of channels.
        pointwise (`bool`, defaults to `True`): a channel is a function of its own row of every source, and all sources
            read the same input; `False` where channels are normalized together in between.
    """

    sources: tuple[str, ...]
    output: str
    segments: int = 1
    width_key: str = "intermediate_size"
    pointwise: bool = True

    def site(self, layer_index: int, path: str, layer: Any) -> Site:
        """Describe the MLP site of `layer`, whose name inside the model is `path`."""
        channel = Segment(1)
        output = Coupling(f"{path}.{self.output}", layer.get_submodule(self.output), 1, (channel,))
        sources = [
            Coupling(f"{path}.{name}", layer.get_submodule(name), 0, (channel,) * self.segments)
            for name in self.sources
        ]
        return Site(
            layer=layer_index,
            kind=MLP,
            projection_name=output.name,
            projection=output.linear,
            num_units=output.linear.in_features,
            couplings=(*sources, output),
            pointwise=self.pointwise,
        )

    def sizes(self, kept: Sequence[int]) -> dict:
        """Return the config entries of the layer once only the channels `kept` are left."""
        return {self.width_key: len(kept)}
