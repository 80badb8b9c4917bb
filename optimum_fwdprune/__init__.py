"""Structured pruning of large language models with forward passes only.

Importing this package imports neither torch nor transformers; its names are loaded on first use, and its model classes
join transformers' Auto classes when those are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._auto_registration import register_when_imported
from .version import __version__


if TYPE_CHECKING:
    from .allocation.plan import PruningPlan as PruningPlan
    from .architectures import Architecture as Architecture
    from .architectures import AttentionLayout as AttentionLayout
    from .architectures import DecoderLayout as DecoderLayout
    from .architectures import MLPLayout as MLPLayout
    from .architectures import find_sites as find_sites
    from .architectures import register_architecture as register_architecture
    from .data.calibration import Calibration as Calibration
    from .data.mixtures import Mixture as Mixture
    from .pruner import FwdPruner as FwdPruner
    from .recovery import RecoveryArguments as RecoveryArguments
    from .recovery import RecoveryRequest as RecoveryRequest
    from .report import PruningReport as PruningReport
    from .scoring.methods import PruningConfig as PruningConfig
    from .scoring.methods import ScoringInputs as ScoringInputs
    from .scoring.methods import register_method as register_method
    from .scoring.scores import Scores as Scores

_HOME = {
    "Architecture": "architectures",
    "AttentionLayout": "architectures",
    "Calibration": "data.calibration",
    "DecoderLayout": "architectures",
    "FwdPruner": "pruner",
    "MLPLayout": "architectures",
    "Mixture": "data.mixtures",
    "PruningConfig": "scoring.methods",
    "PruningPlan": "allocation.plan",
    "PruningReport": "report",
    "RecoveryArguments": "recovery",
    "RecoveryRequest": "recovery",
    "Scores": "scoring.scores",
    "ScoringInputs": "scoring.methods",
    "find_sites": "architectures",
    "register_architecture": "architectures",
    "register_method": "scoring.methods",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


register_when_imported()
