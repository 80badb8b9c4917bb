"""Makes pruned families known to transformers' Auto classes and to PEFT, without importing either to do so.

`import optimum_fwdprune` must be cheap, and `AutoModelForCausalLM.from_pretrained` must know pruned checkpoints after
it. So transformers' mapping of config classes gets an entry per family as soon as it is loaded. The entry imports the
family's module when it is first looked up. However such a module is imported, by that entry, by `pickle` or by name,
its classes are then registered.

PEFT's tables of default target modules are completed when PEFT loads, or when a family is registered after that.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType

from .models.adapter_defaults import PEFT_MODULE, add_adapter_defaults
from .models.families import PREFIX, LazyConfigs, family_modules


_AUTO_MODULE = "transformers.models.auto.configuration_auto"
_FAMILY_MODULES = f"{__package__}.models.{PREFIX}"


class _AfterImport:
    """A meta path finder that finds nothing itself; it wraps the loading of some modules.

    Args:
        prefix (`str`): how their names start.
        then (`Callable[[ModuleType], None]`): what to do with such a module after it is loaded.
    """

    def __init__(self, prefix: str, then: Callable[[ModuleType], None]):
        self.prefix = prefix
        self.then = then

    def find_spec(self, name, path, target=None):
        if not name.startswith(self.prefix):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._followed(spec.loader.exec_module)
        return spec

    def _followed(self, exec_module):
        def exec_and_follow(module):
            exec_module(module)
            self.then(module)

        return exec_and_follow


def _add_entries(configuration_auto: ModuleType) -> None:
    """Let transformers' mapping of config classes import a pruned family when its `model_type` is looked up."""
    mapping = configuration_auto.CONFIG_MAPPING
    mapping._extra_content = LazyConfigs(mapping._extra_content)


def _register_family(module: ModuleType) -> None:
    from .architectures.registry import Architecture, register_architecture

    register_architecture(Architecture.from_module(module))


def _complete_peft(constants: ModuleType) -> None:
    """Complete PEFT's tables by all families that are known now; those that are registered later add themselves."""
    registry = sys.modules.get(f"{__package__}.architectures.registry")
    registered = registry.pruned_types() if registry is not None else {}
    for model_type, pruned_type in ({name: PREFIX + name for name in family_modules()} | registered).items():
        add_adapter_defaults(model_type, pruned_type)


def _once_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module `name` now if it is loaded, else as soon as it is."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


def register_when_imported() -> None:
    """Make the families known to transformers and to PEFT now if these are loaded, else as soon as they are."""
    _once_imported(_AUTO_MODULE, _add_entries)
    _once_imported(PEFT_MODULE, _complete_peft)
    sys.meta_path.insert(0, _AfterImport(_FAMILY_MODULES, _register_family))
