"""The families of this package by name, from the files in this folder, which are not imported for the list."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any


PREFIX = "pruned_"


@functools.cache
def family_modules() -> dict[str, str]:
    """Return the module of every family by the `model_type` of its stock family.

    The file `pruned_llama.py` holds the family whose stock `model_type` is `llama` and whose pruned one is
    `pruned_llama`. Families that the installed transformers lacks are left out.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    package = importlib.import_module(__package__)
    files = (module.name for module in pkgutil.iter_modules(package.__path__) if module.name.startswith(PREFIX))
    return {
        model_type: f"{__package__}.{PREFIX}{model_type}"
        for model_type in sorted(name.removeprefix(PREFIX) for name in files)
        if model_type in CONFIG_MAPPING_NAMES
    }


def import_family(model_type: str) -> None:
    """Import the module of a family, which registers it. Nothing is imported if this package has no such family.

    Args:
        model_type (`str`): `model_type` of the stock family or of the pruned family.

    Raises:
        ImportError: where the installed transformers has the family, but lacks a class that the module needs.
    """
    module = family_modules().get(model_type.removeprefix(PREFIX))
    if module is not None:
        importlib.import_module(module)


def causal_class_name(model_type: str) -> str | None:
    """Return the name of the pruned causal language model of a family of this package, which is not imported; `None`
    where it has none, as multimodal families.

    The names follow from those of the stock classes: `PrunedLlamaForCausalLM`, and `PrunedGPT2ForCausalLM` of
    `GPT2LMHeadModel`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stock = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "").replace("LMHeadModel", "ForCausalLM")
    return f"Pruned{stock}" if stock.endswith("ForCausalLM") else None


class LazyConfigs(dict[str, Any]):
    """Config classes by `model_type`. Reading the entry of a pruned family imports the family, which adds its class.

    Iterating yields the families that were imported so far.
    """

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or (
            isinstance(model_type, str)
            and model_type.startswith(PREFIX)
            and model_type.removeprefix(PREFIX) in family_modules()
        )

    def __missing__(self, model_type: str) -> Any:
        if model_type not in self:
            raise KeyError(model_type)
        import_family(model_type)
        return dict.__getitem__(self, model_type)
