"""Recovery finetuning of pruned models on `transformers.Trainer`: adapters, all weights, distillation.

Modules are imported when a name is first used, so that the command line can read the options without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .arguments import RecoveryArguments as RecoveryArguments
    from .data import TrainingTexts as TrainingTexts
    from .data import training_data as training_data
    from .distillation import Teacher as Teacher
    from .finetuning import recover as recover
    from .options import RecoveryOptions as RecoveryOptions
    from .request import RecoveryRequest as RecoveryRequest
    from .trainer import RecoveryTrainer as RecoveryTrainer

_MODULES = {
    "RecoveryArguments": "arguments",
    "RecoveryOptions": "options",
    "RecoveryRequest": "request",
    "RecoveryTrainer": "trainer",
    "Teacher": "distillation",
    "TrainingTexts": "data",
    "recover": "finetuning",
    "training_data": "data",
}

__all__ = [*_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
