"""Mixtures of experts in files of llama.cpp: their sizes, and one tensor per projection with all experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..loading.offloading import read_parameter
from ..models.experts import ExpertsLayout
from .gguf_families import LayerSizes
from .gguf_tensors import GGUFTensor


if TYPE_CHECKING:
    from gguf import GGUFWriter

# Parameters of experts in transformers, and the tensors of a layer in llama.cpp that hold them.
PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def check_experts(name: str, layout: ExpertsLayout | None, layers: Sequence[LayerSizes]) -> None:
    """Raise `ValueError` where a layer of a mixture has an MLP in the place of its experts."""
    dense = [number for number, sizes in enumerate(layers) if sizes.channels and not sizes.experts]
    if layout is not None and dense:
        raise ValueError(
            f"llama.cpp's {name} has experts in every layer, and layer {dense[0]} of this model has one MLP "
            f"in their place. Only a stock checkpoint holds it (--format stock)."
        )


def add_experts(writer: GGUFWriter, layout: ExpertsLayout, sizes: LayerSizes, config: Any) -> None:
    """Add the number of experts, that of a token, and their number of channels.

    Args:
        writer (`GGUFWriter`): the writer of the file.
        layout (`ExpertsLayout`): the layout of the family's experts.
        sizes (`LayerSizes`): sizes of a layer; all layers are alike.
        config (`PreTrainedConfig`): stock config of the model.
    """
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(getattr(config, layout.chosen_key))
    writer.add_expert_feed_forward_length(sizes.channels)


def mixture_paths(layout: ExpertsLayout | None, layers: Mapping[str, LayerSizes]) -> list[str]:
    """Return the names inside the model of the modules that [`mixture_tensors`] writes: routers and experts."""
    if layout is None:
        return []
    return [f"{path}.{layout.module}.{name}" for path in layers for name in (layout.router, layout.experts)]


def mixture_tensors(
    model: PreTrainedModel, layout: ExpertsLayout | None, layers: Mapping[str, LayerSizes]
) -> Iterator[GGUFTensor]:
    """Yield the tensors of routers and experts. Transformers stores gate and up projections in one parameter,
    llama.cpp in two.

    Args:
        model (`PreTrainedModel`): the model.
        layout (`ExpertsLayout`, *optional*): the layout of the family's experts; without it there are no tensors.
        layers (mapping of `str` to `LayerSizes`): sizes of all layers by their names inside the model.
    """
    if layout is None:
        return
    for number, path in enumerate(layers):
        router, inside = (f"{path}.{layout.module}.{name}" for name in (layout.router, layout.experts))
        for name, parameter in model.get_submodule(router).named_parameters():
            make = partial(read_parameter, model, f"{router}.{name}")
            yield GGUFTensor(f"blk.{number}.ffn_gate_inp.{name}", tuple(parameter.shape), make)
        experts = model.get_submodule(inside)
        for name, parameter in experts.named_parameters():
            kind = "bias" if name.endswith("_bias") else "weight"
            for part in PARTS[name.removesuffix("_bias")]:
                shape = tuple(_part(experts, parameter.to("meta"), part).shape)
                make = partial(_read, model, f"{inside}.{name}", part)
                yield GGUFTensor(f"blk.{number}.ffn_{part}_exps.{kind}", shape, make)


def _read(model: PreTrainedModel, source: str, part: str) -> torch.Tensor:
    return _part(model.get_submodule(source.rpartition(".")[0]), read_parameter(model, source), part)


def _part(experts: nn.Module, values: torch.Tensor, part: str) -> torch.Tensor:
    """Return the gate, up or output projections of all experts, `[experts, rows, columns]`, or their biases.

    Args:
        experts (`nn.Module`): the module, which tells how transformers stores them.
        values (`Tensor`): its parameter with this part.
        part (`str`): `"gate"`, `"up"` or `"down"`.
    """
    if values.dim() > 2 and getattr(experts, "is_transposed", False):
        values = values.transpose(1, 2)
    if part == "down":
        return values
    place = ("gate", "up").index(part)
    if getattr(experts, "is_concatenated", True):
        return values.chunk(2, dim=1)[place]
    # Rows of gates and of up projections take turns.
    return values[:, place::2]
