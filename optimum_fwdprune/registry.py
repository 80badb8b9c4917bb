"""What is known by name: methods, and presets of requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .utils import did_you_mean


if TYPE_CHECKING:
    from .configuration import PruningConfig


@dataclass(frozen=True)
class Method:
    """A registered criterion.

    Args:
        config_class (`type[PruningConfig]`): its config; the class attribute `method` is its name.
        score (`Callable[[ScoringInputs], dict[SiteKey, Tensor] | UnitScores]`): higher scores are kept; one float
            tensor `[num_units]` per site.
        statistics (`tuple[str, ...]`): what it needs measured on the calibration tokens, of
            `optimum_fwdprune.statistics.KINDS_OF_STATISTICS`.
        calibrated (`bool`): it needs the calibration tokens themselves; statistics imply them.
        additive (`bool` or `Callable[[PruningConfig], bool]`): scores of different units add up to the score of their
            removal, so that units of unequal size compete by score per parameter; otherwise by score alone. A
            function where it depends on the options.
        reconstruction (`str`): what follows the method unless the config says otherwise.
        differentiates (`Callable[[PruningConfig], bool]`): whether it back-propagates under the options of a config,
            which no offloaded weight allows.
    """

    config_class: type[PruningConfig]
    score: Callable[..., Any]
    statistics: tuple[str, ...] = ()
    calibrated: bool = False
    additive: bool | Callable[[PruningConfig], bool] = True
    reconstruction: str = "none"
    differentiates: Callable[[PruningConfig], bool] = lambda _config: False

    def is_additive(self, config: PruningConfig) -> bool:
        """Whether its scores add up under the options of `config`."""
        return self.additive(config) if callable(self.additive) else self.additive


METHODS: dict[str, Method] = {}


def get_method(name: str) -> Method:
    """Return the method registered as `name`.

    Raises:
        ValueError: where there is none.
    """
    if name not in METHODS:
        near = did_you_mean(str(name), METHODS)
        raise ValueError(f"method must be one of {', '.join(registered_methods())}; got {name!r}.{near}")
    return METHODS[name]


def registered_methods() -> list[str]:
    """Return the names of the registered methods."""
    return sorted(METHODS)


@dataclass(frozen=True)
class Preset:
    """A named request.

    Args:
        fields (`dict[str, Any]`): of its config; the others keep their defaults. Without `method` it goes with all.
        help (`str`): what it is for, in one line.
    """

    fields: dict[str, Any]
    help: str


PRESETS: dict[str, Preset] = {}


def register_preset(name: str, help: str, **fields) -> None:
    """Make a request known under `name`, for `PruningConfig.from_preset` and `--preset`."""
    PRESETS[name] = Preset(fields, help)


def get_preset(name: str) -> Preset:
    """Return the preset registered as `name`.

    Raises:
        ValueError: where there is none.
    """
    if name not in PRESETS:
        near = did_you_mean(str(name), PRESETS)
        raise ValueError(f"preset must be one of {', '.join(registered_presets())}; got {name!r}.{near}")
    return PRESETS[name]


def registered_presets() -> list[str]:
    """Return the names of the registered presets."""
    return sorted(PRESETS)
