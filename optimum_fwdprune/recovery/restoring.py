"""The state besides weights that training changes: it is stored before training, and restored afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..architectures.wrapping import is_peft_model


# Public attributes of a module that training changes. It also changes private ones, which hold hooks, submodules and
# flags of accelerate.
CHANGED = ("training", "forward", "gradient_checkpointing")

# Private attributes that are not restored: weights are trained, and buffers grow with the length of the text.
KEPT = ("_parameters", "_buffers", "_non_persistent_buffers_set")


class ModelState:
    """Modes, hooks, frozen parameters, adapters, config and generation config of a model.

    Args:
        model (`PreTrainedModel`): the model before training.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._modules = [(module, _attributes(module)) for module in model.modules()]
        self._parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._generation_config: Any = getattr(model, "generation_config", None)
        holders = (model.config, self._generation_config)
        self._configs = [(holder, dict(vars(holder))) for holder in holders if holder is not None]

    def put_back(self, adapters_stay: bool = False) -> None:
        """Restore everything but weights and buffers.

        Args:
            adapters_stay (`bool`, defaults to `False`): leave adapters in the model, with the base's weights frozen.
        """
        for module, attributes in self._modules:
            own = vars(module)
            for name in [name for name in own if name not in attributes and _is_changed(name, adapters_stay)]:
                del own[name]
            for name, (value, content) in attributes.items():
                if name == "_modules":
                    if not adapters_stay:
                        _take_out_adapters(module, content)
                    continue
                own[name] = value
                if isinstance(value, dict):
                    value.clear()
                    value.update(content)
        for parameter, requires_grad in self._parameters:
            parameter.grad = None
            if not adapters_stay:
                parameter.requires_grad_(requires_grad)
        if self._generation_config is not None:
            self._model.generation_config = self._generation_config
        for holder, values in self._configs:
            vars(holder).clear()
            vars(holder).update(values)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return the attributes of a module that training may change, and of dictionaries a copy of their content."""
    own = {name: value for name, value in vars(module).items() if _is_changed(name, adapters_stay=True)}
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in own.items()}


def _is_changed(name: str, adapters_stay: bool) -> bool:
    # PEFT adds the attribute `peft_config` to a model with adapters.
    changed = name in CHANGED or (name.startswith("_") and name not in KEPT)
    return changed or (name == "peft_config" and not adapters_stay)


def _take_out_adapters(module: nn.Module, children: dict[str, nn.Module | None]) -> None:
    for name, child in children.items():
        if is_peft_model(module._modules.get(name)) and not is_peft_model(child):
            module._modules[name] = child


@contextmanager
def left_as_it_was(model: PreTrainedModel | None) -> Iterator[None]:
    """Restore the modes, hooks and frozen parameters of a model after the block; `None` is allowed."""
    state = None if model is None else ModelState(model)
    try:
        yield
    finally:
        if state is not None:
            state.put_back()


@contextmanager
def removed_where_unused(folder: str | Path) -> Iterator[None]:
    """Remove a folder and its parents after the block where the block created them and left them empty."""
    folder = Path(folder).absolute()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    finally:
        for place in made:
            if place.is_dir() and not os.listdir(place):
                place.rmdir()
