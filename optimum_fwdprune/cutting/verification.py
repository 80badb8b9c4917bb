"""Verification: the pruned model must give the same output as the dense model with the plan's gates."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..architectures import SiteKey
from ..architectures.depth import layer_configs
from ..data.calibration import Calibration
from ..forward.losses import plain_outputs
from ..forward.observer import check_called
from ..loading.offloading import input_device, is_offloaded
from ..loading.state import FREQUENCIES, ORIGINAL_FREQUENCIES, evaluating
from ..loading.subject import Subject
from .surgery import empty_pruned_model, share_tensors


class Allowance(NamedTuple):
    """The differences between masked and sliced logits that rounding explains, as fractions of their scale.

    Args:
        always (`float`): the difference that is allowed for every model.
        amplification (`float`): the factor on the effect of one rounding error in the embeddings, for models that
            amplify such errors. Linears sum in float32 or better, so that the order of sums adds no error in 16 bit.
        limit (`float`): largest difference that amplification may allow.
    """

    always: float
    amplification: float
    limit: float


ALLOWANCES = {
    torch.float64: Allowance(1e-8, 100.0, 1e-2),
    torch.float32: Allowance(1e-4, 100.0, 1e-2),
    torch.float16: Allowance(2e-2, 1.0, 0.5),
    torch.bfloat16: Allowance(8e-2, 1.0, 0.5),
}


@torch.no_grad()
def check_counterpart(subject: Subject) -> None:
    """Check, before anything is measured, that a model matches its class and config, from which surgery builds the
    pruned model.

    A counterpart that loses no units is built with the same tensors. It must have the same parameters and, if all of
    them are on one device, the same logits.

    Raises:
        ValueError: where the model was changed in a way that its config does not contain, or a projection is never
            called.
    """
    model, sites = subject.model, subject.sites
    everything = {site.key: list(range(site.num_units)) for site in sites}
    _check_sizes(subject, everything)
    whole = empty_pruned_model(subject, everything, set())
    expected = {name: parameter.shape for name, parameter in whole.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        if parameter.shape != expected[name]:
            raise ValueError(
                f"{name} is {list(parameter.shape)} in this {type(model).__name__} and {list(expected[name])} by its "
                f"config ({_sizes_behind(model, name)}). Set model.config to the sizes of the modules, or load the "
                f"model again."
            )
    missing = sorted(expected.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if missing:
        raise ValueError(
            f"The config of this {type(model).__name__} describes {len(missing)} parameters that the model lacks, "
            f"such as {missing[0]}. Set model.config to the values of the modules, or load the model again."
        )
    _check_shared(model, whole)
    _check_frequencies(model, whole)
    if is_offloaded(model) or len({parameter.device for parameter in model.parameters()}) > 1:
        # The counterpart has no hooks that would move weights and inputs to the same device.
        return
    share_tensors(model, whole)
    probe = probe_batch(model, None)
    calls = dict.fromkeys(everything, 0)
    handles = [site.output.register_forward_pre_hook(partial(_count, calls, site.key)) for site in sites]
    try:
        own = logits(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        check_called(site, calls[site.key])
    # Code that reads the weights reports NaN in them.
    if not own.isfinite().all():
        return
    difference = share_of_scale(own, logits(whole, probe))
    if difference > tolerance_of(own.dtype):
        raise ValueError(
            f"This {type(model).__name__} does not match its class and config: logits differ by {difference:.2g} of "
            f"their scale. The model was changed after it was built: for example, a module was replaced, a hook "
            f"changes outputs, or an entry of its config was set. Undo the change, or load the model with the "
            f"settings that it should have."
        )


def _count(calls: dict[SiteKey, int], key: SiteKey, *_call: Any) -> None:
    calls[key] += 1


def _check_sizes(subject: Subject, everything: dict[SiteKey, list[int]]) -> None:
    """Raise `ValueError` where the sizes of a layer differ from those in the config."""
    model = subject.model
    configs = layer_configs(model.config)
    for layer, sizes in subject.architecture.layer_sizes(model, subject.sites, everything).items():
        for key, size in sizes.items():
            expected = getattr(configs[layer], key, size)
            # Some families derive a size from others.
            if expected is not None and expected != size:
                raise ValueError(
                    f"config.{key} is {expected} and layer {layer} of this {type(model).__name__} has {size}. Set "
                    f"model.config.{key} to the size of the modules, or load the model again."
                )


def _check_shared(model: PreTrainedModel, counterpart: PreTrainedModel) -> None:
    """Raise `ValueError` where modules share a parameter that a checkpoint would contain twice."""
    own = dict(counterpart.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if own[name] is not own[other]:
            raise ValueError(
                f"{other} and {name} are one tensor in this {type(model).__name__} and two by its config. Every layer "
                f"must have its own modules, for example copies by copy.deepcopy."
            )


def _check_frequencies(model: PreTrainedModel, counterpart: PreTrainedModel) -> None:
    """Raise `ValueError` where the rotary embeddings of a model differ from those of its saved checkpoint."""
    for path, module in counterpart.named_modules():
        if FREQUENCIES not in module._buffers or ORIGINAL_FREQUENCIES not in module._buffers:
            continue
        own = model.get_submodule(path).get_buffer(ORIGINAL_FREQUENCIES)
        if own.is_meta:
            # The model has no weights either.
            continue
        own = own.float().cpu()
        for name in (FREQUENCIES, ORIGINAL_FREQUENCIES):
            module._buffers[name] = torch.zeros_like(own)
        counterpart._init_weights(module)  # type: ignore[operator]
        expected = module.get_buffer(ORIGINAL_FREQUENCIES)
        # Models that were converted to 16 bit have rounded frequencies, and some families set none here.
        if expected.any() and not torch.allclose(own, expected, rtol=2e-2):
            raise ValueError(
                f"The rotary embeddings of this {type(model).__name__} are not those of config.rope_parameters, which "
                f"is {model.config.rope_parameters}, so that a saved checkpoint would have other outputs. Set "
                f"model.config.rope_parameters to the values that the model was built with, or load the model again."
            )


def _sizes_behind(model: PreTrainedModel, name: str) -> str:
    """Return the entries of a config that determine the shape of a parameter."""
    config = model.config.get_text_config()
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    owner = model.get_submodule(name.rpartition(".")[0])
    keys = ("vocab_size", "hidden_size") if owner in tables else ("hidden_size", "head_dim")
    return ", ".join(f"{key}={getattr(config, key)}" for key in keys if hasattr(config, key))


def probe_batch(model: PreTrainedModel, calibration: Calibration | None) -> torch.Tensor:
    """Return a few tokens for comparisons, `[1 or 2, at most 32]` int64, from calibration text if there is any."""
    config = model.config.get_text_config()
    # Classifiers accept several rows only if they have a padding token.
    rows = 2 if model.can_generate() or config.pad_token_id is not None else 1
    if calibration is not None and calibration.attention_mask is None:
        return calibration.input_ids[:rows, :32]
    generator = torch.Generator().manual_seed(0)
    tokens = min(32, getattr(config, "max_position_embeddings", 32))
    return torch.randint(config.vocab_size, (rows, tokens), generator=generator)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Return the values with a rounding error of their dtype in a random direction."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, values.shape, generator=generator).to(values.device) * 2 - 1
    return values * (1 + torch.finfo(values.dtype).eps * signs).to(values.dtype)


@torch.no_grad()
def logits(model: PreTrainedModel, probe: torch.Tensor) -> torch.Tensor:
    """Return the first output of `model` for the probe: logits, or hidden states of a model without a head."""
    with evaluating(model):
        return model(input_ids=probe.to(input_device(model)), **plain_outputs(model))[0]


def relative_difference(expected: torch.Tensor, actual: torch.Tensor, rounding: float = 0.0) -> float:
    """Return `share_of_scale`, which must not exceed rounding.

    Args:
        expected, actual (`Tensor`): logits.
        rounding (`float`, defaults to 0): the change of logits by a rounding error in the embeddings.

    Raises:
        RuntimeError: where rounding in the tensors' dtype does not explain the difference.
    """
    difference = share_of_scale(expected, actual)
    tolerance = tolerance_of(expected.dtype, rounding)
    # The comparison is negated so that NaN fails too.
    if not difference <= tolerance:
        cause = "The architecture's layout and its pruned class disagree; please report it."
        if expected.dtype.itemsize < 4:
            cause = (
                "Prune the model in float32. If this succeeds, so much was removed that the model amplifies rounding. "
                f"If it fails, {cause[0].lower()}{cause[1:]}"
            )
        raise RuntimeError(
            f"The pruned model differs from the masked dense model: logits differ by {difference:.2g} of their scale, "
            f"more than the {tolerance:.2g} that rounding in {expected.dtype} explains. {cause}"
        )
    return difference


def tolerance_of(dtype: torch.dtype, rounding: float = 0.0) -> float:
    """Return the `share_of_scale` that rounding in `dtype` explains; `rounding` is that of `relative_difference`."""
    allowed = ALLOWANCES.get(dtype, ALLOWANCES[torch.float32])
    return max(allowed.always, min(allowed.amplification * rounding, allowed.limit))


def share_of_scale(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Return the largest difference as a fraction of the largest expected value."""
    scale = float(expected.float().abs().max().clamp_min(1e-30))
    return float((expected.float() - actual.float()).abs().max()) / scale
