"""Exports: a pruned model in the formats of programs that do not know this package."""

from .stock import export_stock


__all__ = ["export_stock"]
