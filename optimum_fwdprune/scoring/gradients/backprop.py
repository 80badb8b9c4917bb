"""Exact gradients of the calibration loss by back-propagation, as a control for methods without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from transformers import PreTrainedModel

from ...architectures import Site, SiteKey
from ...data.calibration import Calibration, counted_targets
from ...forward.gates import gated
from ...forward.losses import model_nll
from ...runs.progress import progress


def weight_gradients(
    model: PreTrainedModel, parameters: Sequence[torch.Tensor], calibration: Calibration, batch_size: int
) -> list[torch.Tensor]:
    """Return ∂L/∂W of some parameters, accumulated in float32, or in float64 for parameters in float64.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode. Its weights, their `requires_grad` flags and
            their `.grad` are the same afterwards.
        parameters (sequence of `nn.Parameter`): parameters of `model`; a weight that is stored transposed is a view.
        calibration (`Calibration`): L is its mean next-token negative log-likelihood.
        batch_size (`int`): windows per backward pass.

    Raises:
        MemoryError: where gradients and activations do not fit into memory.
        ValueError: where weights are offloaded, or the gradient is not finite.
    """
    _check_fits(model, parameters)
    totals = [
        torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False)
        for parameter in parameters
    ]
    share, scale = 0.0, _loss_scale(model)
    stored = [parameter if parameter._base is None else parameter._base for parameter in parameters]

    def take(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        position = positions[id(parameter)]
        transposed = parameter is not parameters[position]
        totals[position].add_(gradient.T if transposed else gradient, alpha=share / scale)
        parameter.grad = None

    positions = {id(parameter): index for index, parameter in enumerate(stored)}
    with _differentiable(model, stored):
        # Gradients are added to the sums as soon as they are computed, so that there is one full set in memory.
        handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in stored]
        try:
            for loss, share in _batch_losses(model, calibration, batch_size):  # noqa: B007  take() reads share
                (loss * scale).backward()
        finally:
            for handle in handles:
                handle.remove()
    return [_finite(total) for total in totals]


def unit_gradients(
    model: PreTrainedModel, sites: Sequence[Site], calibration: Calibration, batch_size: int
) -> dict[SiteKey, torch.Tensor]:
    """Return ∂L/∂gate of every unit at gates of 1, which is Σ W·∂L/∂W over its projection columns: `[num_units]`.

    The arguments and errors are those of [`weight_gradients`]; only activations are differentiated.
    """
    _check_fits(model, ())
    totals: dict[SiteKey, torch.Tensor] = {}
    scale = _loss_scale(model)
    with _differentiable(model, ()):
        gates = {
            site.key: torch.ones(
                site.num_units,
                dtype=torch.promote_types(site.projection.weight.dtype, torch.float32),
                device=site.projection.weight.device,
                requires_grad=True,
            )
            for site in sites
        }
        with gated(sites, gates):
            for loss, share in _batch_losses(model, calibration, batch_size):
                for key, gradient in zip(gates, torch.autograd.grad(loss * scale, list(gates.values()))):
                    totals[key] = totals.get(key, 0) + share / scale * gradient
    return {key: _finite(total) for key, total in totals.items()}


def _batch_losses(
    model: PreTrainedModel, calibration: Calibration, batch_size: int
) -> Iterator[tuple[torch.Tensor, float]]:
    """Yield the mean loss of every batch with its share of all tokens. Sums would overflow gradients in 16 bit."""
    total = int(counted_targets(calibration.input_ids, calibration.attention_mask).sum())
    for windows in progress(list(calibration.batches(batch_size)), "Back-propagating", unit="batch"):
        sums, counts = model_nll(model, *windows)
        yield sums.sum() / counts.sum(), int(counts.sum()) / total


@contextmanager
def _differentiable(model: PreTrainedModel, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Enable gradients for `parameters`, and for no other parameters of the model, within the context."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        # CUDA raises a class of its own; the CPU's allocator raises a RuntimeError with this text.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(_way_out("Back-propagation ran out of memory.")) from error
        raise
    finally:
        for original, flag, gradient in before:
            original.requires_grad_(flag)
            original.grad = gradient


def _loss_scale(model: PreTrainedModel) -> float:
    # The gradients of a mean loss are below what float16 resolves; bfloat16 has float32's range.
    return 2.0**12 if model.dtype == torch.float16 else 1.0


def _check_fits(model: PreTrainedModel, parameters: Sequence[torch.Tensor]) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Back-propagation is impossible with offloaded weights. Load the model without offloading.")
    # The sums, and the largest gradient while it is added to them. Activations are not counted, so that only gradients
    # that cannot fit are refused.
    needed: dict[torch.device, int] = {}
    for device in {parameter.device for parameter in parameters}:
        sizes = [
            (parameter.numel() * max(4, parameter.element_size()), parameter.nbytes)
            for parameter in parameters
            if parameter.device == device
        ]
        needed[device] = sum(total for total, _ in sizes) + max(own for _, own in sizes)
    for device, size in needed.items():
        free = _free_bytes(device)
        if size > free:
            amounts = f"{size / 2**30:.1f} GiB, and only {free / 2**30:.1f} GiB are free on {device}"
            raise MemoryError(_way_out(f"Exact gradients take {amounts}."))


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # Memory that torch has reserved and does not use is free, too.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _finite(gradient: torch.Tensor) -> torch.Tensor:
    if not gradient.isfinite().all():
        raise ValueError("The exact gradient contains NaN or infinity. Load a 16-bit model in float32.")
    return gradient


def _way_out(problem: str) -> str:
    return (
        f"{problem} Use method='mini_llm' with gradient='zeroth_order', which runs forward passes only, or a smaller "
        f"batch_size."
    )
