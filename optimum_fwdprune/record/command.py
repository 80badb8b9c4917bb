"""The command line that carries out a request."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ..allocation.plan import PLAN_NAME, PruningPlan
from ..request.choices import ReconstructionKind
from ..request.config import UNDECIDED_BY_PLANS
from ..scoring.methods import PruningConfig


def command_of(
    config: PruningConfig,
    model: str = "MODEL",
    output: str = "OUTPUT",
    plan: PruningPlan | None = None,
    calibration: str | None = None,
    loading: Mapping[str, Any] | None = None,
) -> str:
    """Return the command line that prunes a model by this request, or that replays a plan if that was replayed.

    Args:
        config (`PruningConfig`): the request.
        model (`str`, defaults to `"MODEL"`): folder or repository of the model.
        output (`str`, defaults to `"OUTPUT"`): folder to write.
        plan (`PruningPlan`, *optional*): the plan of the pruning.
        calibration (`str`, *optional*): name of the calibration text that was used.
        loading (mapping of `str` to `str` or `True`, *optional*): options of loading the model.
    """
    words = ["optimum-cli", "fwdprune", "prune", "-m", model, output]
    replays = plan is not None and plan.metadata.get("replayed")
    values = config.to_dict()
    # The name of a mixture is a phrase, and the request lists its sources.
    if calibration is not None and not isinstance(values["calibration"], list):
        values["calibration"] = calibration
    # The values that the command uses where an option is left out.
    defaults = type(config)().to_dict()
    if replays:
        words += ["--plan", PLAN_NAME]
        defaults = {name: value for name, value in defaults.items() if name in UNDECIDED_BY_PLANS}
        defaults["reconstruction"] = str(ReconstructionKind.NONE)
    else:
        words += _option("method", config.method)
        # How much was removed is shown also where it is the default, unless a target replaces it.
        replaced = config.has_target or bool(config.limits_of_quality)
        defaults["sparsity"] = values["sparsity"] if replaced else None
    for name, default in defaults.items():
        if name not in ("method", "fwdprune_version") and values[name] not in (None, default):
            words += _option(name, values[name])
    for name, value in (loading or {}).items():
        words += _option(name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    """Return an option of the command line with its value, as a list of words."""
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # A word that begins with a dash would be parsed as an option.
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
