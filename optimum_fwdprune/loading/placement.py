"""Where a model goes: each process of a run to its own accelerator, and a word where an accelerator stands idle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..runs import ranks
from ..runs.loggers import get_logger
from ..runs.shelves import own_folder
from .offloading import input_device


logger = get_logger(__name__)


def placed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` with what several processes need: the accelerator of this process where no
    `device_map` is given, and a folder of its own inside `offload_folder`."""
    options = dict(kwargs)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return options
    device = ranks.own_device()
    if options.get("device_map") is None and device.type != "cpu":
        options["device_map"] = {"": device}
    if options.get("offload_folder") is not None:
        options["offload_folder"] = own_folder(Path(options["offload_folder"]))
    return options


def warn_of_placement(model: PreTrainedModel) -> None:
    """Warn where the model computes on the CPU beside an accelerator, or on the accelerator of another process."""
    device = input_device(model)
    if device.type == "cpu":
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            logger.warning(
                "The model is on the CPU, and this machine has an accelerator (%s) that it does not use. Load it with "
                "device_map=%r, or on the command line with --device_map %s.",
                kind,
                str(kind),
                kind,
            )
        return
    if ranks.world_size() == 1 or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return
    own = ranks.own_device()
    if device.type == own.type and None not in (device.index, own.index) and device != own:
        logger.warning(
            "Process %d of %d computes on %s, and its own accelerator is %s. Leave out device_map, so that each "
            "process takes its own.",
            ranks.rank(),
            ranks.world_size(),
            device,
            own,
        )
