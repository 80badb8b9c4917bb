"""Adding pruned families to PEFT's tables of default target modules, without importing PEFT."""

from __future__ import annotations

import sys


# Module of PEFT with a table for every kind of adapter: the modules that it adapts by default, by `model_type`.
PEFT_MODULE = "peft.utils.constants"
_PEFT_TABLES = "TRANSFORMERS_MODELS_TO_"


def add_adapter_defaults(model_type: str, pruned_type: str) -> None:
    """Let PEFT, if it is imported, adapt the same modules of a pruned family as of its stock family by default.

    Args:
        model_type (`str`): `model_type` of the stock family.
        pruned_type (`str`): `model_type` of the pruned family.
    """
    for name, table in vars(sys.modules.get(PEFT_MODULE, object)).items():
        if name.startswith(_PEFT_TABLES) and isinstance(table, dict) and model_type in table:
            table.setdefault(pruned_type, table[model_type])
