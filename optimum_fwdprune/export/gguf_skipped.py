"""Layers without attention or MLP in files of llama.cpp: the sizes that a file declares, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..architectures.gguf import head_dim_of
from .gguf_families import LayerSizes
from .gguf_tensors import GGUFTensor


def sizes_in_file(layers: Sequence[LayerSizes]) -> list[LayerSizes]:
    """Return the sizes of layers in a file of llama.cpp's `deci`.

    Where `feed_forward_length` is 0, llama.cpp ignores the attention of the layer too. Where the first layer has no
    heads, it does not load the file. A removed MLP therefore has one channel in the file, and a removed attention of
    the first layer one head. Their weights are zero. Other removed attentions have no heads in the file.
    """
    return [
        LayerSizes(
            heads=sizes.heads or int(number == 0),
            kv_heads=sizes.kv_heads or int(number == 0),
            channels=sizes.channels or 1,
        )
        for number, sizes in enumerate(layers)
    ]


def stand_ins(layers: Sequence[LayerSizes], config: Any) -> Iterator[GGUFTensor]:
    """Yield the tensors of sublayers that a file has and the model does not; they write nothing to the stream.

    Args:
        layers (sequence of `LayerSizes`): sizes of the model's layers.
        config (`PreTrainedConfig`): stock config of the model.
    """
    hidden, head = config.hidden_size, head_dim_of(config)
    for number, (sizes, in_file) in enumerate(zip(layers, sizes_in_file(layers), strict=True)):
        shapes: dict[str, tuple[int, ...]] = {}
        if sizes.heads < in_file.heads:
            shapes |= {"attn_norm": (hidden,), "attn_output": (hidden, head)}
            shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head, hidden))
        if sizes.channels < in_file.channels:
            shapes |= {"ffn_norm": (hidden,), "ffn_gate": (1, hidden), "ffn_up": (1, hidden), "ffn_down": (hidden, 1)}
        for name, shape in shapes.items():
            yield GGUFTensor(f"blk.{number}.{name}.weight", shape, partial(torch.zeros, shape))
