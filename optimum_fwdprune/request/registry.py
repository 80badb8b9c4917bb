"""The registries of methods and of presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..words import did_you_mean
from .choices import WIDTH_KINDS


T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """A registered criterion.

    Args:
        config_class (`type[PruningConfig]`): its config, whose class attribute `method` is the criterion's name.
        score (`Callable[[ScoringInputs], dict[SiteKey, Tensor] | UnitScores]`): higher scores are kept; one float
            tensor `[num_units]` per site.
        statistics (`tuple[str, ...]`): statistics of the calibration tokens that it needs, some of
            `optimum_fwdprune.forward.statistics.KINDS_OF_STATISTICS`.
        calibrated (`bool`): whether it needs the calibration tokens themselves; statistics imply them.
        additive (`bool` or `Callable[[PruningConfig], bool]`): whether the scores of several units add up to the score
            of their joint removal. If so, units of unequal size compete by score per parameter, otherwise by score
            alone. It is a function where it depends on the options.
        kinds (`tuple[str, ...]`): the kinds that it scores, any of `"attention"`, `"mlp"`, `"expert"`, `"layer"` and
            `"sublayer"`. The default is the first two. Layers and sublayers have their own keys and one score each
            (`optimum_fwdprune.allocation.depth`). A request for them, or for experts, that the method receives has no
            other kinds.
        by_site (`bool`): whether the scores of a site depend on its weights and statistics alone. Then sites of kinds
            that a request does not remove are neither measured nor scored.
        learns_split (`bool`): whether it learns how the budget is split over the layers; `scope=None` then means
            `"global"`.
        differentiates (`Callable[[PruningConfig], bool]`): whether it back-propagates under the options of a config,
            which is impossible with offloaded weights.
        windows (`Callable[[PruningConfig], float | None]`): number of calibration windows that it passes through the
            whole model, besides the pass that collects statistics, for estimates of time. Back-propagation counts
            as two more passes. `None` where the number depends on more than the options.
    """

    config_class: type[Any]
    score: Callable[..., Any]
    statistics: tuple[str, ...] = ()
    calibrated: bool = False
    additive: bool | Callable[[Any], bool] = True
    kinds: tuple[str, ...] = WIDTH_KINDS
    by_site: bool = False
    learns_split: bool = False
    differentiates: Callable[[Any], bool] = lambda _config: False
    windows: Callable[[Any], float | None] = lambda _config: 0

    def __post_init__(self):
        object.__setattr__(self, "statistics", tuple(self.statistics))

    @property
    def summary(self) -> str:
        """A description in one line, the first line of its config's docstring."""
        return (self.config_class.__doc__ or "").strip().partition("\n")[0]

    def is_additive(self, config: Any) -> bool:
        """Whether its scores add up under the options of `config`."""
        return self.additive(config) if callable(self.additive) else self.additive


METHODS: dict[str, Method] = {}


def get_method(name: str) -> Method:
    """Return the method registered as `name`.

    Raises:
        ValueError: where there is none.
    """
    namesake = f" {name!r} is a preset and not a method; write PruningConfig.from_preset({name!r})."
    return _registered("method", name, METHODS, PRESETS, namesake)


def registered_methods() -> list[str]:
    """Return the names of the registered methods."""
    return sorted(METHODS)


@dataclass(frozen=True)
class Preset:
    """A named set of overrides of the defaults.

    Args:
        fields (`dict[str, Any]`): the options that it overrides; without a method, it can be used with every method.
        help (`str`): its description in one line.
    """

    fields: dict[str, Any]
    help: str

    def described(self) -> str:
        """Return its description, followed by the options of the command line that it overrides."""
        options = []
        for name, value in self.fields.items():
            if isinstance(value, bool):
                options.append(f"--{'' if value else 'no-'}{name}")
            else:
                options.append(" ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])]))
        return f"{self.help} Overrides: {' '.join(options) or 'nothing'}."


PRESETS: dict[str, Preset] = {}


def register_preset(name: str, help: str, **fields) -> None:
    """Register a set of overrides as `name`, for `prune(name)`, `PruningConfig.from_preset` and `--preset`."""
    PRESETS[name] = Preset(fields, help)


def get_preset(name: str) -> Preset:
    """Return the preset registered as `name`.

    Raises:
        ValueError: where there is none.
    """
    namesake = f" {name!r} is a method and not a preset; pass method={name!r}."
    return _registered("preset", name, PRESETS, METHODS, namesake)


def registered_presets() -> list[str]:
    """Return the names of the registered presets."""
    return sorted(PRESETS)


def _registered(kind: str, name: Any, entries: Mapping[str, T], others: Mapping[str, Any], namesake: str) -> T:
    """Return the entry called `name`; errors end with `namesake` where the name is one of `others`."""
    if isinstance(name, str) and name in entries:
        return entries[name]
    hint = namesake if isinstance(name, str) and name in others else did_you_mean(str(name), entries)
    raise ValueError(f"{kind} must be one of {', '.join(sorted(entries))}; got {name!r}.{hint}")
