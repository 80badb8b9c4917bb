"""Requests as JSON values, in files and on the Hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import as_path
from ..runs.loggers import get_logger
from ..version import __version__
from ..words import name_and_weight, public_name
from .choices import ReconstructionKind
from .options import Options


logger = get_logger(__name__)

CONFIG_NAME = "fwdprune_config.json"

# The key under which a file names the version that wrote it.
VERSION_KEY = "fwdprune_version"

# Options that have no influence on the result. They may hold paths of this machine, which checkpoints must not reveal.
OF_THE_MACHINE = ("resume", "resume_seconds", "latency_table")

# Reconstructions that were the defaults of methods in earlier versions, whose files have `null` instead.
RECONSTRUCTION_OF_OLD_FILES = {
    "flap": ReconstructionKind.BIAS,
    "magnitude": ReconstructionKind.NONE,
    "random": ReconstructionKind.NONE,
}


def json_values(config: Options) -> dict[str, Any]:
    """Return the options and the version as JSON values, without options that concern this machine alone.

    Of a calibration file only the name is returned, not its folder.
    """
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_THE_MACHINE}
    if isinstance(config.calibration, list):
        values["calibration"] = list(map(_public_name, config.calibration))
    elif config.calibration is not None:
        values["calibration"] = public_name(config.calibration)
    return {**values, VERSION_KEY: __version__}


def _public_name(source: str) -> str:
    """Return a source of a mixture without its folder, and with its weight."""
    name, weight = name_and_weight(source)
    return public_name(name) if weight is None else f"{public_name(name)}:{weight:g}"


def json_text(config: Options) -> str:
    """Return the content of a config file."""
    return json.dumps(json_values(config), indent=2) + "\n"


def check_values_of_file(values: Any) -> dict[str, Any]:
    """Return a copy of the values of a file, completed where files of earlier versions lack values.

    Raises:
        ValueError: where they are no dictionary.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"A config is made from a dictionary of its options; got a {type(values).__name__}.")
    values = dict(values)
    if "reconstruction" in values and values["reconstruction"] is None:
        by_default = ReconstructionKind.LEAST_SQUARES
        values["reconstruction"] = RECONSTRUCTION_OF_OLD_FILES.get(str(values.get("method")), by_default)
    return values


def known_options(values: dict[str, Any], config_class: type[Options]) -> dict[str, Any]:
    """Return the values of a file that are options of a config; a warning names the others."""
    written_by = values.get(VERSION_KEY, "an unknown version")
    known = {declared.name for declared in dataclasses.fields(config_class)}
    unknown = sorted(map(str, values.keys() - known - {VERSION_KEY}))
    if unknown:
        logger.warning(
            "Ignoring the unknown keys %s of a config written by optimum-fwdprune %s; this is %s.",
            ", ".join(unknown),
            written_by,
            __version__,
        )
    return {name: value for name, value in values.items() if name in known}


def read_values(name_or_path: str | Path, **hub_kwargs) -> dict[str, Any]:
    """Return the values of the config file of a pruned checkpoint, a folder or a repository of the Hub.

    Raises:
        ValueError: where the file is no JSON object; the message names the file.
    """
    path = as_path(name_or_path, "name_or_path") / CONFIG_NAME
    if not Path(name_or_path).is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(str(name_or_path), CONFIG_NAME, **hub_kwargs))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(values).__name__}.")
    return values
