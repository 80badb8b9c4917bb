"""The types of GGUF files: how long their blocks are, and which program writes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GGUFType:
    """A type of the matrices of a GGUF file.

    Args:
        file_type (`str`): the name of the file type in llama.cpp, as the package gguf has it.
        block (`int`, defaults to 1): number of consecutive values of a row that share scales. The type cannot hold
            rows whose length is no multiple of it.
        instead (`str`, defaults to `"f16"`): the types of matrices with such rows.
        quantize (`bool`, defaults to `False`): whether the file is made by llama.cpp's program `llama-quantize`.
    """

    file_type: str
    block: int = 1
    instead: str = "f16"
    quantize: bool = False


def _k_quant(name: str, instead: str) -> GGUFType:
    """Return a type that `llama-quantize` makes. Every file has matrices of several types, so that rows that no block
    fits have several types too."""
    return GGUFType(f"MOSTLY_{name}", 256, instead, quantize=True)


# By the names that options and functions take. What llama-quantize writes instead is in tensor_type_fallback of its
# src/llama-quant.cpp.
GGUF_TYPES = {
    "f32": GGUFType("ALL_F32"),
    "f16": GGUFType("MOSTLY_F16"),
    "bf16": GGUFType("MOSTLY_BF16"),
    "q8_0": GGUFType("MOSTLY_Q8_0", 32),
    "q5_1": GGUFType("MOSTLY_Q5_1", 32),
    "q5_0": GGUFType("MOSTLY_Q5_0", 32),
    "q4_1": GGUFType("MOSTLY_Q4_1", 32),
    "q4_0": GGUFType("MOSTLY_Q4_0", 32),
    "q6_k": _k_quant("Q6_K", "q8_0"),
    "q5_k_m": _k_quant("Q5_K_M", "q5_1 and q8_0"),
    "q5_k_s": _k_quant("Q5_K_S", "q5_1 and q8_0"),
    "q4_k_m": _k_quant("Q4_K_M", "q5_0 and q8_0"),
    "q4_k_s": _k_quant("Q4_K_S", "q5_0, q5_1 and q8_0"),
    "q3_k_l": _k_quant("Q3_K_L", "q4_0, q5_1 and q8_0"),
    "q3_k_m": _k_quant("Q3_K_M", "q4_0, q5_0, q5_1 and q8_0"),
    "q3_k_s": _k_quant("Q3_K_S", "q4_0 and q8_0"),
    "q2_k": _k_quant("Q2_K", "q4_0, q5_0 and q8_0"),
}
