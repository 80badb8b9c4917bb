"""Exports: a pruned model in the formats of programs that do not know this package."""

from .gguf import export_gguf
from .stock import export_stock


__all__ = ["export_gguf", "export_stock"]
