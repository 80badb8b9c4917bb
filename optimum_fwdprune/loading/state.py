"""The state of a model that forward passes change, and how it is restored; and the mark of a consumed model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# Rotary embeddings of these types recompute their frequencies for the length of the text.
BY_LENGTH = ("dynamic", "longrope")

# The names of their frequencies, and of the length that these are computed for. In families with several kinds of
# layers, the kind precedes these names.
FREQUENCIES, ORIGINAL_FREQUENCIES = "inv_freq", "original_inv_freq"
LONGEST, ORIGINAL_LONGEST = "max_seq_len_cached", "original_max_seq_len"


def mark_consumed(model: PreTrainedModel) -> None:
    """Mark `model` as consumed, since weights were cut in place; it then refuses to run and to be saved."""
    if is_consumed(model):
        return
    model.__dict__["_consumed_by_pruning"] = True
    model.register_forward_pre_hook(_refuse_to_run, prepend=True)
    # Saving would write a checkpoint without these weights. The functions hold the message and not the model, which a
    # reference to itself would keep alive.
    refuse = partial(_refuse, _was_consumed(model))
    model.__dict__.update(dict.fromkeys(("save_pretrained", "push_to_hub", "generate"), refuse))


def is_consumed(model: nn.Module) -> bool:
    """Return whether weights of `model` were cut in place."""
    return model.__dict__.get("_consumed_by_pruning", False)


def check_not_consumed(model: PreTrainedModel) -> None:
    """Raise `ValueError` where weights of `model` were cut in place."""
    if is_consumed(model):
        raise ValueError(_was_consumed(model))


def _was_consumed(model: PreTrainedModel) -> str:
    name = model.config._name_or_path
    where = f".from_pretrained({name!r})" if name else ", for example with from_pretrained"
    return (
        f"This {type(model).__name__} was consumed by prune(), which cuts weights in place and was finished or "
        f"interrupted: some of its tensors are empty. Load it again{where}. prune(inplace=False) keeps the model, "
        f"and needs memory for both."
    )


def _refuse_to_run(model: PreTrainedModel, _arguments: Any) -> None:
    check_not_consumed(model)


def _refuse(message: str, *_args: Any, **_options: Any) -> None:
    raise ValueError(message)


@contextmanager
def forward_state_kept(model: nn.Module) -> Iterator[None]:
    """Reset the state of `model` to that after loading while the context is open, and restore its state afterwards.

    The state consists of the buffers of all modules, and of the attributes of modules that have buffers. Rotary
    embeddings such as dynamic NTK recompute their frequencies for the longest text so far, so that the output of a
    model depends on the texts before.
    """
    states = [_State.of(module) for module in model.modules() if module._buffers]
    forget_lengths(model)
    try:
        yield
    finally:
        for state in states:
            state.put_back()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put `model` into eval mode while the context is open, and restore its modes and its state afterwards.

    Matrices are multiplied in a dtype that the processor has instructions for.

    Raises:
        ValueError: where `model` was consumed by pruning.
    """
    check_not_consumed(model)
    modes = [(module, module.training) for module in model.modules()]
    # Torch is imported late, since the package is also imported by commands that need no model.
    from ..runs.products import products_in_float32

    with forward_state_kept(model), products_in_float32(model):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def forget_lengths(model: nn.Module) -> None:
    """Reset rotary embeddings to the frequencies that they have after loading."""
    for module in model.modules():
        rope_type = str(getattr(module, "rope_type", ""))
        if not any(name in rope_type for name in BY_LENGTH):
            continue
        names = {*module._buffers, *vars(module)}
        for name in (name for name in names if name.endswith(ORIGINAL_FREQUENCIES)):
            original: Any = getattr(module, name)
            current = name.removesuffix(ORIGINAL_FREQUENCIES) + FREQUENCIES
            now = module._buffers.get(current)
            if now is None or original is None or original.is_meta:
                continue
            # A new tensor, since the old one may be shared with another model.
            module._buffers[current] = original.to(now.device).clone()
        for name in (name for name in names if name.endswith(LONGEST)):
            setattr(module, name, getattr(module, ORIGINAL_LONGEST, getattr(module, name)))


@dataclass(frozen=True)
class _State:
    """Buffers of a module with copies of their values, and its attributes."""

    module: nn.Module
    buffers: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        buffers = {
            name: (buffer, None if buffer is None else buffer.detach().clone())
            for name, buffer in module._buffers.items()
        }
        return cls(module, buffers, _attributes(module))

    def put_back(self) -> None:
        import torch

        for name in self.module._buffers.keys() - self.buffers.keys():
            del self.module._buffers[name]
        for name, (buffer, value) in self.buffers.items():
            now = self.module._buffers.get(name)
            if buffer is None or value is None or (now is not None and now.device != buffer.device):
                # If the model was moved during the context, it stays on its new device.
                buffer = value if value is None or now is None else value.to(now.device)
            elif not buffer.is_meta and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            self.module._buffers[name] = buffer
        for name in _attributes(self.module).keys() - self.attributes.keys():
            delattr(self.module, name)
        self.module.__dict__.update(self.attributes)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module's own code sets; those of torch and accelerate begin with an underscore."""
    kept = ("training", "forward")
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in kept}
