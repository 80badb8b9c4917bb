"""The placement of a model on the accelerator of its process, and warnings where an accelerator is not used."""

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
    """Return arguments of `from_pretrained`, adapted to one of several processes.

    The model goes to the accelerator of this process unless `device_map` is set, and `offload_folder` becomes a folder
    of this process inside of it. In a single process the arguments stay the same.
    """
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
    """Warn where the model is on the CPU although there is an accelerator, or on that of another process."""
    device = input_device(model)
    if device.type == "cpu":
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            logger.warning(
                "The model is on the CPU, although this machine has an accelerator (%s). Load it with "
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
            "Process %d of %d computes on %s, although its own accelerator is %s. Leave out device_map, so that every "
            "process uses its own.",
            ranks.rank(),
            ranks.world_size(),
            device,
            own,
        )
