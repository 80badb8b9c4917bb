"""Sweeps: many sizes of one model from one scoring, measured and compared."""

from .measuring import Measures
from .result import SweepResult, SweepRow


__all__ = ["Measures", "SweepResult", "SweepRow"]
