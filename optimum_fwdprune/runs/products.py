"""Products of 16-bit matrices on processors that have no instructions for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .loggers import get_logger


logger = get_logger(__name__)

# PyTorch's own kernels are faster for fewer rows, since converting the weights takes longer than the product.
FEWEST_ROWS = 16

# The largest part of a weight that is converted at a time, in values.
LARGEST_PART = 16 * 2**20

_16_BIT = (torch.bfloat16, torch.float16)

# In-place products are not among them, since their result has to stay in 16 bit.
_MATRICES = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
_LINEARS = {torch.ops.aten.linear.default, torch.ops.aten.matmul.default}
_OTHERS = {
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
_PRODUCTS = _MATRICES | _LINEARS | _OTHERS


class _State(threading.local):
    """Which modes are active in a thread."""

    dtypes: tuple[torch.dtype, ...] = ()
    suspended: int = 0


_state = _State()


def has_instructions_for(dtype: torch.dtype) -> bool:
    """Return whether the CPU has instructions for matrices of this dtype. PyTorch takes five to fifty times as long as
    in float32 where it has none, such as with AVX2 alone."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in names:
        return True
    try:
        return getattr(torch.ops.mkldnn, names[dtype])()
    except (AttributeError, RuntimeError):
        # This version of PyTorch does not tell.
        return True


@contextmanager
def products_in_float32(model: torch.nn.Module | None = None) -> Iterator[None]:
    """Multiply 16-bit matrices on the CPU in float32 while the context is open, where it has no instructions for them.

    Results are rounded to 16 bit, as those of PyTorch's own products are, whose sums are in float32 too. What a
    training keeps for its gradients stays in 16 bit.

    Args:
        model (`Module`, *optional*): the model that runs within the context; nothing is done where it has no such
            weights. By default any model may run.
    """
    slow = [dtype for dtype in _16_BIT if not has_instructions_for(dtype) and dtype not in _state.dtypes]
    if model is not None:
        present = {parameter.dtype for parameter in model.parameters()}
        slow = [dtype for dtype in slow if dtype in present]
    if not slow:
        yield
        return
    before, _state.dtypes = _state.dtypes, (*_state.dtypes, *slow)
    try:
        with _InFloat32(slow):
            yield
    finally:
        _state.dtypes = before


@contextmanager
def products_as_served() -> Iterator[None]:
    """Multiply as PyTorch does by itself while the context is open, for times that are those of the model in use."""
    _state.suspended += 1
    try:
        yield
    finally:
        _state.suspended -= 1


def warn_of_slow_products(model: torch.nn.Module) -> None:
    """Warn where PyTorch by itself multiplies the matrices of a model slowly, which times show."""
    weights = [weight for weight in model.parameters() if weight.ndim > 1 and weight.device.type == "cpu"]
    dtype = next((weight.dtype for weight in weights if not has_instructions_for(weight.dtype)), None)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            "This processor has no instructions for %s, which PyTorch multiplies many times more slowly than float32. "
            "The times are those of %s; load the model in float32 (dtype='float32') to serve and time it.",
            name,
            name,
        )


class _InFloat32(TorchDispatchMode):
    """Converts the factors of products from some dtypes to float32, and their results back."""

    def __init__(self, dtypes: list[torch.dtype]):
        super().__init__()
        self._dtypes = dtypes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _state.suspended or function not in _PRODUCTS:
            return function(*args, **kwargs)
        factors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        first = factors[-2] if function in _MATRICES else factors[0]
        has_few_rows = function not in _OTHERS and first.numel() < FEWEST_ROWS * first.shape[-1]
        dtype = factors[0].dtype
        if has_few_rows or dtype not in self._dtypes or not all(_is_like(value, dtype) for value in factors):
            return function(*args, **kwargs)
        if function in _MATRICES and not kwargs:
            return _product(*factors[-2:], *factors[:-2])
        args = [_in_float32(value) for value in args]
        kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
        results = function(*args, **kwargs)
        if isinstance(results, torch.Tensor):
            return results.to(dtype)
        # The logarithms of the sums of attention are in float32 whatever the dtype.
        is_forward = function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return (results[0].to(dtype), *results[1:]) if is_forward else tuple(value.to(dtype) for value in results)


def _is_like(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a factor is on the CPU, and of a dtype or a mask. Tensors of other classes, such as quantized or
    distributed ones, have products of their own."""
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    # Attention has boolean masks, and sums in float32.
    return is_plain and value.device.type == "cpu" and value.dtype in (dtype, torch.bool, torch.float32)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _16_BIT else value


def _product(values: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `values @ matrix + bias`. The matrix is converted in parts, so that it takes little memory."""
    dtype, values = values.dtype, values.float()
    columns = max(1, LARGEST_PART // max(1, matrix.shape[0]))
    parts = [values @ part.float() for part in matrix.split(columns, dim=1)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return (whole if bias is None else whole.add_(bias.float())).to(dtype)
