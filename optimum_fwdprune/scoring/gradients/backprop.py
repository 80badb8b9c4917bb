"""Exact gradients of the calibration loss by back-propagation: the memory-hungry control for forward-only methods."""

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
    """Return ∂L/∂W of some parameters, accumulated in float32 (float64 where the model is).

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode. Its weights, their `requires_grad` flags and
            their `.grad` are afterwards what they were.
        parameters (sequence of `nn.Parameter`): of `model`; a weight that the model stores transposed is a view.
        calibration (`Calibration`): L is its mean next-token negative log-likelihood.
        batch_size (`int`): windows per backward pass.

    Raises:
        MemoryError: where gradients and activations do not fit.
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
        # Taken as soon as they are there, so that never two sets of gradients are.
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
    """Yield each batch's mean loss with its share of all tokens: sums would overflow 16-bit gradients."""
    total = int(counted_targets(calibration.input_ids, calibration.attention_mask).sum())
    for input_ids, attention_mask in progress(list(calibration.batches(batch_size)), "Back-propagating", unit="batch"):
        sums, counts = model_nll(model, input_ids, attention_mask)
        yield sums.sum() / counts.sum(), int(counts.sum()) / total


@contextmanager
def _differentiable(model: PreTrainedModel, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let gradients flow to `parameters` and to nothing else of the model."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        # CUDA has a class for it, the CPU's allocator has a sentence.
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
        raise ValueError("Back-propagation cannot reach offloaded weights; load the model without offloading.")
    # The sums, and the largest gradient while it is handed over; nothing for activations: what does not fit now never
    # will.
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
            amounts = f"{size / 2**30:.1f} GiB and only {free / 2**30:.1f} GiB are free on {device}"
            raise MemoryError(_way_out(f"Exact gradients take {amounts}."))


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # What torch keeps for itself but does not use is free too.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _finite(gradient: torch.Tensor) -> torch.Tensor:
    if not gradient.isfinite().all():
        raise ValueError("The exact gradient holds NaN or infinity; a 16-bit model may need float32 for it.")
    return gradient


def _way_out(problem: str) -> str:
    return f"{problem} gradient='zeroth_order' needs forward passes only; a smaller batch_size needs less memory."
