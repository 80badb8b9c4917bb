"""Tensors of GGUF files: the order of their rows, and how they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..request.gguf import GGUF_TYPES
from ..runs.loggers import get_logger
from ..runs.progress import progress


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter


logger = get_logger(__name__)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file: its name, its shape, and a function that returns its values, called when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows of queries or keys from halves, which transformers rotates, to pairs, which llama.cpp rotates.

    Args:
        rows (`Tensor[heads * head_dim, ...]`): rows of a layer's projection.
        heads (`int`): number of heads of this layer.
    """
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def separated(rows: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Reorder rows that hold the queries, the key and the value of one KV head after the other, to all queries, all
    keys and all values.

    Args:
        rows (`Tensor[(heads + 2 * kv_heads) * head_dim, ...]`): rows of a layer's projection.
        heads (`int`): number of query heads of this layer.
        kv_heads (`int`): number of KV heads.
    """
    groups = rows.unflatten(0, (kv_heads, heads // kv_heads + 2, -1))
    return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])


# Of models with so many layers, which it takes to be of the 27B size, llama.cpp scales queries by the hidden size per
# head rather than by the size of a head.
LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}


def with_scaled_queries(values: torch.Tensor, config: Any, heads: int) -> torch.Tensor:
    """Multiply a parameter of a Gemma's queries by the factor that makes llama.cpp scale them as the config says.

    Args:
        values (`Tensor`): rows of the query projection, or the weight of the norm after it.
        config (`PreTrainedConfig`): stock config, with the number of layers that are left.
        heads (`int`): number of query heads that are left.
    """
    is_27b = config.num_hidden_layers == LAYERS_OF_27B[config.model_type]
    divisor = config.hidden_size // heads if is_27b else config.head_dim
    factor = (divisor / config.query_pre_attn_scalar) ** 0.5
    return values if factor == 1 else values.float() * factor


def write_tensors(writer: GGUFWriter, tensors: list[GGUFTensor], dtype: str) -> None:
    """Declare all tensors in the header, then compute, convert and write them one by one."""
    import gguf
    import numpy as np

    kinds: list[GGMLQuantizationType] = []
    # Where there is no output matrix, the embeddings are used instead.
    output = "output.weight" if any(tensor.name == "output.weight" for tensor in tensors) else "token_embd.weight"
    for tensor in tensors:
        shape = tensor.shape
        kind = gguf.GGMLQuantizationType[_type_of(tensor, dtype, tensor.name == output).upper()]
        kinds.append(kind)
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        whole = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        held = np.dtype(np.float32 if kind is gguf.GGMLQuantizationType.F32 else np.float16) if whole else np.uint8
        size = int(np.prod(stored))
        writer.add_tensor_info(tensor.name, shape if whole else stored, np.dtype(held), size, None if whole else kind)
    _warn_of_other_types([tensor for tensor in tensors if not _is_in_float32(tensor)], dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in progress(list(zip(tensors, kinds)), "Writing tensors", unit="tensor"):
        values = tensor.make().detach().cpu().float().numpy()
        if kind is gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
            raise ValueError(f"{tensor.name} has values beyond the range of float16; write bf16 or f32 instead.")
        writer.write_tensor_data(gguf.quantize(values, kind))


# Ends of the names of tensors that are written in float32, although they have several axes.
IN_FLOAT32 = ("_norm.weight", "position_embd.weight", ".bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def _type_of(tensor: GGUFTensor, dtype: str, is_output: bool) -> str:
    """Return the type in which a tensor is written.

    llama.cpp multiplies by norms in float32, also by those with weights for every head, and adds positions and the
    biases of experts in it. Routers keep float32, since rounding would change the experts of a token. The matrix that
    computes the logits has eight bits in files of four and five, where llama-quantize takes more bits too.
    """
    if _is_in_float32(tensor):
        return "f32"
    kind = "q8_0" if is_output and GGUF_TYPES[dtype].block > 1 else dtype
    return kind if tensor.shape[-1] % GGUF_TYPES[kind].block == 0 else GGUF_TYPES[kind].instead


def _is_in_float32(tensor: GGUFTensor) -> bool:
    return len(tensor.shape) < 2 or tensor.name.endswith(IN_FLOAT32)


def _warn_of_other_types(matrices: list[GGUFTensor], dtype: str) -> None:
    """Warn of matrices whose rows the blocks of a type do not divide."""
    wanted = GGUF_TYPES[dtype]
    odd = [matrix.shape[-1] for matrix in matrices if matrix.shape[-1] % wanted.block]
    if odd:
        logger.warning(
            "%d of %d matrices are written in %s instead of %s, because %d does not divide their rows of %s values. "
            "Pruning with for_gguf='%s' chooses widths that it divides.",
            len(odd),
            len(matrices),
            wanted.instead,
            dtype,
            wanted.block,
            ", ".join(map(str, sorted(set(odd)))),
            dtype,
        )
