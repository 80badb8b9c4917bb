"""Registers the pruned classes with transformers' Auto classes and with PEFT, without importing either to do so.

`import optimum_fwdprune` must be cheap, and `AutoModelForCausalLM.from_pretrained` must know pruned checkpoints after
it. So registration waits for transformers: it happens when the outermost import that brought the Auto classes in has
finished. Earlier, in the middle of that import, modelling files of transformers or of this package may be half loaded.

PEFT's tables of default target modules are completed when PEFT loads, or when a family is registered after that.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys

from .models.adapter_defaults import PEFT_MODULE, add_adapter_defaults


_AUTO_MODULE = "transformers.models.auto.configuration_auto"


class _AfterTransformers:
    """A meta path finder that finds nothing itself. It wraps the loading of modules of `transformers` and of this
    package."""

    def __init__(self):
        self.depth = 0

    def find_spec(self, name, path, target=None):
        if not name.startswith(("transformers.", f"{__package__}.")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._then_register(spec.loader.exec_module)
        return spec

    def _then_register(self, exec_module):
        def wrapped(module):
            self.depth += 1
            try:
                exec_module(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and _AUTO_MODULE in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        return wrapped


class _AfterPeft:
    """A meta path finder that finds nothing itself; it wraps the loading of the module with PEFT's tables."""

    def find_spec(self, name, path, target=None):
        if name != PEFT_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._then_complete(spec.loader.exec_module)
        return spec

    def _then_complete(self, exec_module):
        def wrapped(module):
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            registry = sys.modules.get("optimum_fwdprune.architectures.registry")
            # Families that are registered later come by themselves.
            for model_type, pruned_type in registry.pruned_types().items() if registry else ():
                add_adapter_defaults(model_type, pruned_type)

        return wrapped


def _register() -> None:
    importlib.import_module("optimum_fwdprune.architectures")


def register_when_transformers_loads() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if _AUTO_MODULE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTransformers())


def register_when_peft_loads() -> None:
    """Complete PEFT's tables as soon as PEFT is loaded; where it is, families complete them as they are registered."""
    if PEFT_MODULE not in sys.modules:
        sys.meta_path.insert(0, _AfterPeft())
