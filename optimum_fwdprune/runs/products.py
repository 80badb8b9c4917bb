"""Products of 16-bit matrices on processors that have no instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .loggers import get_logger


logger = get_logger(__name__)

# PyTorch's own kernels are faster for fewer rows, since converting the weights takes longer than the product.
FEWEST_ROWS = 16

# The largest part of a weight that is converted at a time, in values.
LARGEST_PART = 16 * 2**20

_16_BIT = (torch.bfloat16, torch.float16)

# In-place products are not among them, since their result has to stay in 16 bit.
_PRODUCTS = {
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.matmul,
    torch.mm,
    torch.Tensor.addmm,
    torch.Tensor.baddbmm,
    torch.Tensor.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    functional.scaled_dot_product_attention,
}


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

    Results are rounded to 16 bit, as those of PyTorch's own products are, whose sums are in float32 too.

    Args:
        model (`Module`, *optional*): the model that runs within the context; nothing is done where it has no such
            weights. By default any model may run.
    """
    slow = [dtype for dtype in _16_BIT if not has_instructions_for(dtype)]
    if model is not None:
        present = {parameter.dtype for parameter in model.parameters()}
        slow = [dtype for dtype in slow if dtype in present]
    if not slow or _InFloat32.is_open:
        yield
        return
    _InFloat32.is_open = True
    try:
        with _InFloat32(slow):
            yield
    finally:
        _InFloat32.is_open = False


@contextmanager
def products_as_served() -> Iterator[None]:
    """Multiply as PyTorch does by itself while the context is open, for times that are those of the model in use."""
    before, _InFloat32.is_suspended = _InFloat32.is_suspended, True
    try:
        yield
    finally:
        _InFloat32.is_suspended = before


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


class _InFloat32(TorchFunctionMode):
    """Converts the factors of products from some dtypes to float32, and their results back."""

    is_open = is_suspended = False

    def __init__(self, dtypes: list[torch.dtype]):
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, is_linear = kwargs or {}, function is functional.linear
        if self.is_suspended or not (is_linear or function in _PRODUCTS):
            return function(*args, **kwargs)
        factors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        has_few_rows = is_linear and factors[0].numel() < FEWEST_ROWS * factors[0].shape[-1]
        if has_few_rows or not all(map(self._is_slow, factors)):
            return function(*args, **kwargs)
        if is_linear:
            return _linear(*args, **kwargs)
        dtype = factors[0].dtype
        args = [_in_float32(value) for value in args]
        kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
        return function(*args, **kwargs).to(dtype)

    def _is_slow(self, value: torch.Tensor) -> bool:
        # Other classes, such as quantized or distributed weights, have products of their own.
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        # A mask may be boolean.
        return is_plain and value.device.type == "cpu" and (value.dtype in self._dtypes or value.dtype == torch.bool)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _16_BIT else value


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the output of a linear layer, whose weight is converted in parts, so that it takes little memory."""
    dtype, values = input.dtype, input.float()
    rows = max(1, LARGEST_PART // weight.shape[-1])
    biases = [None] * len(weight.split(rows)) if bias is None else bias.split(rows)
    parts = [
        functional.linear(values, part.float(), None if own is None else own.float()).to(dtype)
        for part, own in zip(weight.split(rows), biases)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
