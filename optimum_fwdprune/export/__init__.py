"""Exports of pruned models to the formats of programs without support for pruned models."""

from .gguf import export_gguf
from .stock import export_stock


__all__ = ["export_gguf", "export_stock"]
