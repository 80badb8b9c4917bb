"""The request: `PruningConfig`, with a subclass for every method."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import as_path, write_text_atomically
from ..words import did_you_mean
from .budget_options import DEFAULT_METHOD, default_method
from .checks import check_one_budget, check_types, check_values
from .choices import ReconstructionKind
from .fields import Heading
from .files import (
    CONFIG_NAME,
    check_values_of_file,
    json_text,
    json_values,
    known_options,
    read_values,
)
from .options import Options
from .registry import METHODS, Method, get_method, get_preset, registered_methods


# The preset that overrides no option: it stands for the defaults of the options.
DEFAULT_PRESET = "balanced"


@dataclass
class PruningConfig(Options):
    """The options of a pruning: how much is removed, how units are chosen, and on which text this is measured.

    `PruningConfig(method="flap", ...)` returns the method's own subclass, which has further fields. The help of every
    field is in its metadata, and is shown by `optimum-cli fwdprune prune --help`.

    Raises:
        ValueError: on a value out of range; the message names the value and the way out.
    """

    def __new__(cls, method: str | None = None, *args, **kwargs):
        if cls is PruningConfig:
            if isinstance(method, numbers.Real):
                raise TypeError(f"method must be a name; got {method!r}. Options are named: sparsity={method!r}.")
            check_one_budget([name for name, value in kwargs.items() if value is not None])
            cls = get_method(default_method(kwargs.get("kinds")) if method is None else method).config_class
        known = inspect.signature(cls.__init__).parameters
        for name in kwargs:
            if name not in known:
                raise TypeError(_no_option(cls, name, known))
        return super().__new__(cls)

    def __post_init__(self):
        check_types(self)
        own = type(self).method
        if self.method != own:
            get_method(self.method)
            raise ValueError(
                f"{type(self).__name__} is the config of {own!r}; for {self.method!r} use "
                f"PruningConfig(method={self.method!r}, ...)."
            )
        check_values(self)
        # From here on every assignment is checked.
        self.__dict__["_checked"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_checked" not in self.__dict__:
            super().__setattr__(name, value)
            return
        known = [declared.name for declared in dataclasses.fields(self)]
        if name not in known:
            raise AttributeError(_no_option(type(self), name, known))
        changed = dataclasses.replace(self, **{name: value})
        super().__setattr__(name, getattr(changed, name))

    @classmethod
    def of(cls, request: PruningConfig | str | None = None, *, replays: bool = False, **fields) -> PruningConfig:
        """Return the config of a request.

        Args:
            request (`PruningConfig` or `str`, *optional*): a config, which is copied and checked again, or the name of
                a preset. The default is the preset `"balanced"`, which has the defaults of all fields.
            replays (`bool`, defaults to `False`): the config is for a plan that exists already. Nothing is
                reconstructed then unless the request or a field asks for it.
            fields: options that override those of the request.

        Raises:
            TypeError: where `request` is something else, or a field is not an option.
            ValueError: where a value is out of range, or a field has no effect because a plan exists already; the
                message names the field.
        """
        if replays:
            decided = sorted(fields.keys() - UNDECIDED_BY_PLANS)
            if decided:
                options = ", ".join(f"{name}={fields[name]!r}" for name in decided)
                raise ValueError(
                    f"The plan determines which units are kept, so {options} would have no effect. Leave out these "
                    f"options, or prune without the plan."
                )
            if request is None:
                fields.setdefault("reconstruction", ReconstructionKind.NONE)
        if isinstance(request, PruningConfig):
            if fields.get("method", request.method) != request.method:
                get_method(fields["method"])
                raise ValueError(
                    f"The request is a config of method {request.method!r}, which method={fields['method']!r} cannot "
                    f"change. Leave out method, or pass the options by name and no config."
                )
            changed = dataclasses.replace(request, **fields)
            if "sparsity" in fields:
                check_one_budget([name for name, value in vars(changed).items() if value is not None])
            return changed
        if request is None or isinstance(request, str):
            return cls.from_preset(DEFAULT_PRESET if request is None else request, **fields)
        way_out = (
            f"Options are named: sparsity={request!r}."
            if isinstance(request, numbers.Real)
            else "Calibration text and tokens are passed as dataset=."
        )
        raise TypeError(
            f"A request is a PruningConfig, the name of a preset, or options by name; got a "
            f"{type(request).__name__}. {way_out}"
        )

    @classmethod
    def from_preset(cls, name: str, **fields) -> PruningConfig:
        """Return the request registered as `name`, such as a paper's published settings; `fields` override its own.

        Raises:
            ValueError: where there is no such preset, or it is one of another method.
        """
        preset, asked = get_preset(name).fields, method_of(name, fields)
        method = asked if cls is PruningConfig else cls.method
        if preset.get("method", method) != method:
            raise ValueError(f"Preset {name!r} is for method {preset['method']!r}, not for {method!r}.")
        return cls(**{**preset, **fields, "method": method})

    def to_dict(self) -> dict[str, Any]:
        """Return the options and the version as JSON values, without options that concern this machine alone.

        Of a calibration file only the name is returned, not its folder.
        """
        return json_values(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningConfig:
        """Build the config of `values["method"]`; keys that are no options of this version are dropped with a warning.

        Raises:
            ValueError: where `values` is no dictionary, or a value is out of range.
        """
        values = check_values_of_file(values)
        config_class = get_method(values.get("method", DEFAULT_METHOD)).config_class if cls is PruningConfig else cls
        return config_class(**known_options(values, config_class))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `fwdprune_config.json` into a folder."""
        write_text_atomically(as_path(save_directory, "save_directory") / CONFIG_NAME, json_text(self))

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_kwargs) -> PruningConfig:
        """Read the config of a pruned checkpoint: a folder, or a repository of the Hub.

        Args:
            name_or_path (`str` or `Path`): folder or repository id.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like, for `huggingface_hub.hf_hub_download`.
        """
        return cls.from_dict(read_values(name_or_path, **hub_kwargs))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **commit_kwargs):
        """Write `fwdprune_config.json` to a repository of the Hub, creating it where it is missing.

        Args:
            repo_id (`str`): repository id.
            private (`bool`, *optional*): visibility of a new repository.
            token (`str`, *optional*): access token; by default that of the user who is logged in.
            commit_kwargs: `revision`, `commit_message`, `create_pr` and the like, for `HfApi.upload_file`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        content = json_text(self).encode()
        return api.upload_file(path_or_fileobj=content, path_in_repo=CONFIG_NAME, repo_id=repo_id, **commit_kwargs)


def method_of(preset: str | None, fields: Mapping[str, Any]) -> str:
    """Return the name of the method that a preset and options by name, which override it, ask for.

    Raises:
        ValueError: where there is no such preset.
    """
    options = {**(get_preset(preset).fields if preset is not None else {}), **fields}
    return str(options.get("method") or default_method(options.get("kinds")))


def _no_option(config_class: type[PruningConfig], name: str, known: Iterable[str]) -> str:
    """Return the message for an option that a config lacks, because it belongs to another method or is misspelt."""
    owners = [
        owner
        for owner in registered_methods()
        if name in (declared.name for declared in dataclasses.fields(METHODS[owner].config_class))
    ]
    hint = did_you_mean(name, known)
    if name == "preset":
        hint = " A preset is the first argument, such as prune('best')."
    if owners:
        hint = f" That is an option of method={' or method='.join(map(repr, owners))}."
    return f"{config_class.__name__} has no option {name!r}.{hint}"


def register_method(config_class: type[PruningConfig], score: Callable[..., Any], **properties) -> None:
    """Register a criterion under `config_class.method`.

    Args:
        config_class (`type[PruningConfig]`): the criterion's config, a dataclass that extends [`PruningConfig`] and
            sets `method`.
        score (`Callable`): the criterion's function; see [`Method`].
        properties: the other fields of [`Method`], such as `statistics` or `additive`.

    Raises:
        ValueError: where `config_class` is no such dataclass.
        TypeError: where a method has no such property.
    """
    if config_class is PruningConfig or not issubclass(config_class, PruningConfig):
        raise ValueError("config_class must be a dataclass that extends PruningConfig and sets the field `method`.")
    METHODS[config_class.method] = Method(config_class, score, **properties)


# Options that have an effect also where the plan exists already.
UNDECIDED_BY_PLANS = {
    declared.name
    for declared in dataclasses.fields(PruningConfig)
    if declared.metadata.get("group") in (Heading.RECONSTRUCTION, Heading.CALIBRATION, Heading.RUNNING)
}
