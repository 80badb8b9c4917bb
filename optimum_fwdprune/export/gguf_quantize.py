"""GGUF files in the types that llama.cpp's own program writes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..request.gguf import GGUF_TYPES
from ..runs.progress import one_step


PROGRAM = "llama-quantize"

# Lines of its output that an error shows.
LAST_LINES = 10


def check_writable(dtype: str) -> None:
    """Raise `FileNotFoundError` where a type needs a program that is not there."""
    if GGUF_TYPES[dtype].quantize:
        find_llama_quantize(dtype)


def find_llama_quantize(dtype: str) -> Callable[[Path], None]:
    """Return a function that replaces a GGUF file by one in a type that `llama-quantize` writes.

    Args:
        dtype (`str`): the type, such as `"q4_k_m"`.

    Raises:
        FileNotFoundError: where `llama-quantize` is not on the PATH; the message says how to get it.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        own = [name for name, kind in GGUF_TYPES.items() if not kind.quantize]
        raise FileNotFoundError(
            f"{dtype} is a type that llama.cpp's {PROGRAM} writes, and it is not on the PATH. It comes with "
            f"llama.cpp: `brew install llama.cpp`, `winget install llama.cpp`, or a release of "
            f"https://github.com/ggml-org/llama.cpp. Without it, the export writes {', '.join(own)}."
        )
    return partial(_quantized, program, dtype)


def _quantized(program: str, dtype: str, file: Path) -> None:
    quantized = file.with_name(f"{file.name}.{dtype}")
    try:
        with one_step(f"Quantizing to {dtype}"):
            command = [program, str(file), str(quantized), dtype.upper()]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not quantized.is_file():
            last = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-LAST_LINES:])
            raise RuntimeError(f"{program} ended with status {done.returncode} and wrote no file:\n{last}")
        quantized.replace(file)
    finally:
        quantized.unlink(missing_ok=True)
