"""What forward passes change in a model beside its output and how it is put back; and whether a model is whole."""

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

# Where they keep the frequencies, and the length that these are for. Families with several kinds of layers put the
# kind in front of the names.
FREQUENCIES, ORIGINAL_FREQUENCIES = "inv_freq", "original_inv_freq"
LONGEST, ORIGINAL_LONGEST = "max_seq_len_cached", "original_max_seq_len"


def mark_consumed(model: PreTrainedModel) -> None:
    """Note on `model` that some of its weights were cut away in place, and have it refuse to run or to be saved."""
    if is_consumed(model):
        return
    model.__dict__["_consumed_by_pruning"] = True
    model.register_forward_pre_hook(_refuse_to_run, prepend=True)
    # It would write a checkpoint without those weights. The message alone is kept: the model would keep itself alive.
    refuse = partial(_refuse, _was_consumed(model))
    model.__dict__.update(dict.fromkeys(("save_pretrained", "push_to_hub", "generate"), refuse))


def is_consumed(model: nn.Module) -> bool:
    """Whether weights of `model` were cut away in place."""
    return model.__dict__.get("_consumed_by_pruning", False)


def check_not_consumed(model: PreTrainedModel) -> None:
    """Raise `ValueError` where weights of `model` were cut away in place."""
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
    """Run `model` from the state that it has when it is loaded, and put its own state back afterwards.

    The state is the buffers of all modules, and the attributes of modules that have buffers: rotary embeddings such as
    dynamic NTK recompute their frequencies for the longest text so far, so that what a model computes depends on what
    it computed before.
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
    """Put `model` into eval mode while the context is open, and leave modes, buffers and what forward passes change in
    its modules as they were.

    Raises:
        ValueError: where `model` was consumed by pruning.
    """
    check_not_consumed(model)
    modes = [(module, module.training) for module in model.modules()]
    with forward_state_kept(model):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def forget_lengths(model: nn.Module) -> None:
    """Give rotary embeddings the frequencies that they have before any text: those that a loaded checkpoint has."""
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
                # Whoever moved the model keeps it where it is.
                buffer = value if value is None or now is None else value.to(now.device)
            elif not buffer.is_meta and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
            self.module._buffers[name] = buffer
        for name in _attributes(self.module).keys() - self.attributes.keys():
            delattr(self.module, name)
        self.module.__dict__.update(self.attributes)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module's own code sets; what torch and accelerate keep there begins with an underscore."""
    kept = ("training", "forward")
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in kept}
