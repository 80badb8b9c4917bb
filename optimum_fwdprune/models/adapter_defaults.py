"""PEFT's tables of default target modules, completed by pruned families; PEFT is not imported."""

from __future__ import annotations

import sys


# Where PEFT has the modules that each kind of adapter is put on by default, in tables by `model_type`.
PEFT_MODULE = "peft.utils.constants"
_PEFT_TABLES = "TRANSFORMERS_MODELS_TO_"


def add_adapter_defaults(model_type: str, pruned_type: str) -> None:
    """Let PEFT put adapters on the same modules of a pruned family as of its stock family, where PEFT is loaded.

    Args:
        model_type (`str`): of the stock family.
        pruned_type (`str`): of the pruned one.
    """
    for name, table in vars(sys.modules.get(PEFT_MODULE, object)).items():
        if name.startswith(_PEFT_TABLES) and isinstance(table, dict) and model_type in table:
            table.setdefault(pruned_type, table[model_type])
