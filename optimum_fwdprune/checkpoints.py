"""States of long runs on disk: written whole, and taken up only by the run that they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .calibration import Calibration
from .configuration import PruningConfig
from .utils import first_difference, load_tensors, save_tensors_atomically


def identity_of(
    model: PreTrainedModel, calibration: Calibration, config: PruningConfig, without: Iterable[str]
) -> dict[str, Any]:
    """Return what a state belongs to, as JSON values: the weights, the tokens, and the request `without` some fields
    that do not change the run."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(
            f"{name} {parameter.dtype} {float(parameter.detach().abs().sum(dtype=torch.float64))!r}".encode()
        )
    request = {name: value for name, value in config.to_dict().items() if name not in without}
    return {
        "model": model.config._name_or_path or type(model).__name__,
        "weights": digest.hexdigest()[:16],
        "tokens": calibration.fingerprint,
        "request": request,
    }


def save_state(
    path: Path, tensors: dict[str, torch.Tensor], numbers: dict[str, Any], identity: dict[str, Any]
) -> None:
    """Write a state beside `path` and rename it, with what it belongs to."""
    save_tensors_atomically(path, tensors, {**numbers, "identity": identity})


def load_state(path: Path, identity: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the tensors and the numbers of a state.

    Raises:
        ValueError: where it belongs to another run, naming the first difference, or is damaged.
    """
    try:
        tensors, numbers = load_tensors(path)
        found = numbers.pop("identity")
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise not_a_state(path, error) from error
    difference = first_difference(found, json.loads(json.dumps(identity)))
    if difference:
        raise ValueError(
            f"{path} belongs to another run: {difference}. Name another file, or delete it to start afresh."
        )
    return tensors, numbers


def not_a_state(path: Path, error: Exception) -> ValueError:
    """Return the error that says that the file is damaged, or something else."""
    return ValueError(f"{path} is no checkpoint of a run: {type(error).__name__}: {error}.")
