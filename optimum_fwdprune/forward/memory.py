"""The memory of a prefill, simulated on the meta device: nothing is computed, and no memory is taken."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..architectures.sizes import ModelSizes


@dataclass(frozen=True)
class Memory:
    """The memory that a model takes while it serves prompts, in bytes.

    Args:
        weights (`int`): its weights, tied ones counted once.
        caches (`tuple[int, ...]`): the KV cache of every layer that has one, first to last.
        activations (`int`): the largest size of all other tensors at a time.
    """

    weights: int
    caches: tuple[int, ...]
    activations: int

    @property
    def cache(self) -> int:
        """The KV cache of all layers."""
        return sum(self.caches)

    @property
    def total(self) -> int:
        """Weights, KV cache and activations together."""
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        parts = ((self.weights, "weights"), (self.cache, "KV cache"), (self.activations, "activations"))
        listed = ", ".join(f"{size / 1e6:,.0f} MB of {name}" for size, name in parts)
        return f"{self.total / 1e6:,.0f} MB: {listed}"


class _Allocated(TorchDispatchMode):
    """Adds up the bytes of tensors that operations allocate, while they live.

    Attributes:
        peak (`int`): the largest sum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._take(tensor.untyped_storage())
        return outputs

    def know(self, model: torch.nn.Module) -> None:
        """Leave out the weights and buffers of a model."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._known.add(tensor.untyped_storage()._cdata)

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


# Products of the tokens of every expert with its weights, which the meta device knows in bfloat16 alone.
_GROUPED = ("grouped_mm", "_grouped_mm")


class _Fused(TorchFunctionMode):
    """Lets fused attention and the products of experts allocate their outputs only, as their kernels do; on the meta
    device these would be decomposed or refused."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if getattr(function, "__name__", "") in _GROUPED:
            rows, weights = args[:2]
            return rows.new_empty(*rows.shape[:-1], weights.shape[-1])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def simulated_memory(model: PreTrainedModel, batch_size: int, tokens: int) -> Memory:
    """Return the memory that a prefill with a KV cache takes.

    Args:
        model (`PreTrainedModel`): a causal language model on the meta device, in eval mode. Its config may change.
        batch_size (`int`): number of prompts.
        tokens (`int`): tokens per prompt.

    Raises:
        ValueError: where the model cannot be simulated, because its computations depend on values of tensors.
    """
    # Experts that run one after the other depend on the routing.
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    prompts = torch.zeros(batch_size, tokens, dtype=torch.int64, device="meta")
    with _Fused(), _Allocated() as allocated:
        allocated.know(model)
        try:
            outputs: Any = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"The memory of this {type(model).__name__} cannot be predicted: {type(error).__name__}: {error} Use "
                f"target_bytes instead."
            ) from error
    caches = tuple(_bytes_of(layer) for layer in outputs.past_key_values.layers)
    return Memory(ModelSizes.of(model).bytes, caches, allocated.peak - sum(caches))


def memory_of(model: PreTrainedModel, batch_size: int, tokens: int) -> Memory:
    """Return the memory that a prefill of a model takes, which may be on any device; see [`simulated_memory`]."""
    model_class: Any = type(model)
    with torch.device("meta"):
        skeleton = model_class._from_config(copy.deepcopy(model.config))
    return simulated_memory(skeleton.to(model.dtype).eval(), batch_size, tokens)


def _bytes_of(layer: Any) -> int:
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
