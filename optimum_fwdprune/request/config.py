"""The request: `PruningConfig`, whose subclasses are those of methods."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import as_path, write_text_atomically
from ..runs.loggers import get_logger
from ..version import __version__
from ..words import did_you_mean, public_name
from .choices import (
    AttentionUnit,
    BudgetSharing,
    Choice,
    Layout,
    ReconstructionKind,
    ReconstructionOrder,
    ReconstructionTarget,
    Scope,
    UnitKind,
)
from .registry import (
    METHODS,
    Method,
    get_method,
    get_preset,
    registered_methods,
)


logger = get_logger(__name__)

CONFIG_NAME = "fwdprune_config.json"
DEFAULT_METHOD = "wanda_sp"

# The preset that overrides nothing: the defaults of the fields are its recipe.
DEFAULT_PRESET = "balanced"

# Reconstructions that methods once had by default. Files of that time have `null` in their place.
RECONSTRUCTION_OF_OLD_FILES = {
    "flap": ReconstructionKind.BIAS,
    "magnitude": ReconstructionKind.NONE,
    "random": ReconstructionKind.NONE,
}

# Fields that say nothing of what comes of a request. Checkpoints get shared, home directories do not.
OF_THE_MACHINE = ("resume", "resume_seconds", "latency_table")


def option(default: Any, help: str, choices: Iterable[str] | None = None, group: str | None = None) -> Any:
    """Declare a config field with its default, its help text and, where it has them, its allowed values.

    Args:
        default: its value where nobody says.
        help (`str`): what it does, for the command line.
        choices (iterable of `str`, *optional*): its allowed values; a [`Choice`] is one.
        group (`str`, *optional*): heading of the command line's help that it stands under; by default the method's.
    """
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = tuple(map(str, choices))
    if group is not None:
        metadata["group"] = group
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=str(default) if isinstance(default, Choice) else default, metadata=metadata)


def field_type(hint: Any) -> tuple[Any, bool, bool]:
    """Reduce a field's annotation to its element type, whether it is a list, and whether it may be `None`."""
    is_optional = isinstance(hint, types.UnionType) and types.NoneType in typing.get_args(hint)
    if is_optional:
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True, is_optional
    return hint, False, is_optional


# Headings of the command line's help.
METHOD, BUDGET, SHARES, SEARCH = "method", "budget", "how the budget is shared", "search, with --scope search"
UNITS, RECONSTRUCTION, CALIBRATION = "what is pruned", "reconstruction", "calibration"
RUNNING = "interrupt and resume"

# Budgets for the whole model.
_TARGETS = ("target_parameters", "target_bytes", "target_speedup")

_AT_LEAST_ONE = (
    "search_windows",
    "rounds",
    "latency_tokens",
    "n_samples",
    "seq_len",
    "batch_size",
    "multiple_of",
    "min_units_per_site",
)

# What is accepted as a value of an annotated type; numbers of numpy and the like are.
_ACCEPTED = {str: str, bool: bool, int: numbers.Integral, float: numbers.Real}


@dataclass
class PruningConfig:
    """What to remove, how to choose it, and on which text.

    `PruningConfig(method="flap", ...)` returns the method's own subclass, with its own fields. The help of every field
    stands in its metadata and in `optimum-cli fwdprune prune --help`.

    Raises:
        ValueError: on a value out of range, naming the value and the way out.
    """

    method: str = option(DEFAULT_METHOD, "How units are scored.", group=METHOD)
    sparsity: float = option(
        0.2, "Fraction of the prunable parameters (all that heads and channels own) to remove.", group=BUDGET
    )
    target_parameters: int | None = option(
        None, "Instead of sparsity: parameters of the whole pruned model, at most.", group=BUDGET
    )
    target_bytes: int | None = option(
        None, "Instead of sparsity: bytes of the pruned weights on disk, at most.", group=BUDGET
    )
    target_speedup: float | None = option(
        None,
        "Instead of sparsity: how many times as fast as the dense model the pruned one must be at a prefill, by "
        "latencies of layers that are measured on this machine.",
        group=BUDGET,
    )
    latency_tokens: int = option(512, "Length of the prompt, one alone, that target_speedup is for.", group=BUDGET)
    latency_table: str | None = option(
        None, "File to keep the measured latencies in; target_speedup uses one that it finds there.", group=BUDGET
    )
    attention_sparsity: float | None = option(None, "A budget of their own for the attention units.", group=BUDGET)
    mlp_sparsity: float | None = option(None, "A budget of their own for the MLP channels.", group=BUDGET)
    scope: str | None = option(
        None,
        "Whether every layer loses the same share (layer), layers compete for one budget (global), or the loss of "
        "whole pruned models decides what each site loses (search). Default: layer, and global for methods that learn "
        "how the budget is split, where layout is any.",
        Scope,
        group=SHARES,
    )
    search_windows: int = option(
        600,
        "Calibration windows that scope=search may pass through the model; the more, the better it ends.",
        group=SEARCH,
    )
    rounds: int = option(
        1, "Prune in so many rounds of equal size, and score what is left anew in each.", group=SHARES
    )
    budget: str = option(
        BudgetSharing.SEPARATE,
        "Whether attention and MLP each give their share, or compete for one budget.",
        BudgetSharing,
        group=SHARES,
    )
    kinds: list[str] | None = option(
        None,
        "Which kinds of units to prune. Default: mlp, and query heads too where attention_sparsity asks for them or "
        "the layers would lose more than 90 % of their channels.",
        UnitKind,
        group=UNITS,
    )
    attention_unit: str = option(
        AttentionUnit.QUERY_HEAD,
        "Under grouped-query attention: query heads, as many in every group, or a KV group with all its query heads.",
        AttentionUnit,
        group=UNITS,
    )
    layout: str = option(
        Layout.ANY,
        "stock: cut every layer alike, as far as a checkpoint that unmodified transformers loads can hold it.",
        Layout,
        group=UNITS,
    )
    multiple_of: int = option(
        1,
        "Round every pruned MLP width to a multiple of this, for fast kernels; layers round up or down so that all of "
        "them together come nearest to the budget.",
        group=UNITS,
    )
    skip_layers: list[int] | None = option(
        None,
        "Layers that stay unpruned; negative numbers count from the last, and an empty list means no layer. Default: "
        "the first and last two of models of 12 layers and more where scope is layer and layout is any, unless the "
        "other layers would lose more than 90 % of what is pruned in them.",
        group=UNITS,
    )
    min_units_per_site: int = option(1, "Heads and channels that every layer keeps at least.", group=UNITS)
    reconstruction: str = option(
        ReconstructionKind.LEAST_SQUARES,
        "How the kept weights make up for the removed ones: not at all (none), by a bias that replaces the mean "
        "output of what was removed (bias), or refitted by least_squares.",
        ReconstructionKind,
        group=RECONSTRUCTION,
    )
    reconstruction_order: str | None = option(
        None,
        "Whether least squares refits all projections on the dense model's activations, or layer by layer on those of "
        "the layers pruned before (default).",
        ReconstructionOrder,
        group=RECONSTRUCTION,
    )
    reconstruction_target: str | None = option(
        None,
        "What sequential least squares fits: what brings the residual stream back to the dense model's (default where "
        "the architecture allows it), or what the layer itself would have said.",
        ReconstructionTarget,
        group=RECONSTRUCTION,
    )
    refit_sources: bool = option(
        False,
        "Let sequential least squares refit what makes the features too: queries, keys and values so that they say "
        "what they said in the dense model, the linears before an activation so that the projection behind it comes "
        "nearer to its target.",
        group=RECONSTRUCTION,
    )
    ridge: float | None = option(
        None,
        "Ridge of least squares, as a share of the mean squared activation. Default: chosen per projection on "
        "held-out calibration windows.",
        group=RECONSTRUCTION,
    )
    calibration: str | None = option(
        None,
        "Calibration text: wikitext2, c4, self (sampled from the model), builtin (Python's documentation, for smoke "
        "runs), a .txt, .json, .jsonl or .parquet file, or a dataset of the Hub. Default: wikitext2 where the Hub or "
        "its cache answers, else self.",
        group=CALIBRATION,
    )
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.", group=CALIBRATION)
    dataset_split: str = option("train", "Split of a Hub dataset.", group=CALIBRATION)
    dataset_column: str | None = option(
        None, "Column of the text, the chat messages or the token ids. Default: found by its name.", group=CALIBRATION
    )
    n_samples: int = option(128, "Calibration windows.", group=CALIBRATION)
    seq_len: int = option(256, "Tokens per calibration window.", group=CALIBRATION)
    batch_size: int = option(8, "Windows per forward pass.", group=CALIBRATION)
    seed: int = option(0, "Seed of everything random.", group=CALIBRATION)
    resume: str | None = option(
        None,
        "Folder for the state of long stages. The same request, run again, resumes from it.",
        group=RUNNING,
    )
    resume_seconds: float = option(
        60.0, "How often a stage writes its state; 0 writes after every step.", group=RUNNING
    )

    def __new__(cls, method: str | None = None, *args, **kwargs):
        if cls is PruningConfig:
            if isinstance(method, numbers.Real):
                raise TypeError(f"method must be a name; got {method!r}. Options are named: sparsity={method!r}.")
            cls = get_method(DEFAULT_METHOD if method is None else method).config_class
        known = inspect.signature(cls.__init__).parameters
        for name in kwargs:
            if name not in known:
                raise TypeError(_no_option(cls, name, known))
        return super().__new__(cls)

    def __post_init__(self):
        self._check_types()
        own = type(self).method
        if self.method != own:
            get_method(self.method)
            raise ValueError(
                f"{type(self).__name__} is the config of {own!r}; for {self.method!r} use "
                f"PruningConfig(method={self.method!r}, ...)."
            )
        for name in ("sparsity", "attention_sparsity", "mlp_sparsity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(
                    f"{name} must be in [0, 1); got {value}. It is the fraction of the prunable parameters to remove."
                )
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.ridge is not None and self.ridge < 0:
            raise ValueError(f"ridge must be at least 0; got {self.ridge}.")
        least_squares = self.reconstruction == ReconstructionKind.LEAST_SQUARES
        if self.reconstruction_order == ReconstructionOrder.SEQUENTIAL and not least_squares:
            raise ValueError(
                f"reconstruction_order='sequential' refits weights, and reconstruction is "
                f"{self.reconstruction!r} here; ask for reconstruction='least_squares', or leave the order "
                f"'independent'."
            )
        if self.reconstruction_target is not None and self.reconstruction_order == ReconstructionOrder.INDEPENDENT:
            raise ValueError(
                f"reconstruction_target={self.reconstruction_target!r} is for least squares layer by layer, and "
                f"reconstruction_order is 'independent' here; leave one of them out."
            )
        if self.refit_sources and (
            not least_squares
            or self.reconstruction_order == ReconstructionOrder.INDEPENDENT
            or self.reconstruction_target == ReconstructionTarget.LAYER
        ):
            raise ValueError(
                f"refit_sources goes with least squares layer by layer towards the dense model, and reconstruction is "
                f"{self.reconstruction!r}, its order {self.reconstruction_order!r}, its target "
                f"{self.reconstruction_target!r} here; set refit_sources=False, or leave these out."
            )
        if self.layout == Layout.STOCK and (self.resolved_scope != Scope.LAYER or self.skip_layers):
            raise ValueError(
                f"layout='stock' cuts every layer alike, and scope={self.scope!r} with "
                f"skip_layers={self.skip_layers} does not; leave out scope and skip_layers."
            )
        if self.resume_seconds < 0:
            raise ValueError(f"resume_seconds must be at least 0; got {self.resume_seconds}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}.")
        targets = [name for name in _TARGETS if getattr(self, name) is not None]
        for name in targets:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if len(targets) > 1:
            raise ValueError(f"{' and '.join(targets)} are two budgets; give one of them.")
        if self.kinds is not None and not self.kinds:
            raise ValueError("kinds must name attention, mlp or both; got none.")
        for kind in UnitKind:
            if getattr(self, f"{kind}_sparsity") is not None and kind not in self.resolved_kinds:
                raise ValueError(f"{kind}_sparsity is a budget for {kind}, which kinds={self.kinds} leaves alone.")
        if self.has_budget_per_kind and targets:
            raise ValueError("A target for the whole model and a sparsity per kind are two budgets; give one of them.")
        for declared in dataclasses.fields(self):
            choices, value = declared.metadata.get("choices"), getattr(self, declared.name)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if choices is not None and item is not None and item not in choices:
                    near = did_you_mean(str(item), choices)
                    raise ValueError(f"{declared.name} must be one of {', '.join(choices)}; got {item!r}.{near}")
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

    @property
    def resolved_scope(self) -> str:
        """The scope, with the default of `None` put in: `"layer"`, and `"global"` for methods that learn the split,
        where the layout allows it."""
        if self.scope is not None:
            return self.scope
        if self.layout == Layout.STOCK:
            return Scope.LAYER
        method = METHODS.get(self.method)
        return Scope.GLOBAL if method is not None and method.learns_split else Scope.LAYER

    @property
    def resolved_kinds(self) -> list[str]:
        """The kinds, with the default of `None` put in: `["mlp"]`, and attention where it has a budget of its own."""
        if self.kinds is not None:
            return self.kinds
        return [UnitKind.MLP] if self.attention_sparsity is None else list(UnitKind)

    @property
    def has_budget_per_kind(self) -> bool:
        """Whether attention and MLP have budgets of their own."""
        return self.attention_sparsity is not None or self.mlp_sparsity is not None

    def sparsity_of(self, kind: str) -> float:
        """Return the sparsity asked for `"attention"` or `"mlp"`."""
        sparsity: float = getattr(self, self.field_of(kind))
        return sparsity

    def field_of(self, kind: str) -> str:
        """Return the name of the field that `sparsity_of` is from."""
        return "sparsity" if getattr(self, f"{kind}_sparsity") is None else f"{kind}_sparsity"

    def _check_types(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            kind, is_list, is_optional = field_type(hint)
            value = getattr(self, name)
            if kind not in _ACCEPTED or (is_optional and value is None):
                continue
            items = value if is_list else [value]
            if not isinstance(items, (list, tuple)) or not all(
                isinstance(item, _ACCEPTED[kind]) and (kind is bool or not isinstance(item, bool)) for item in items
            ):
                wanted = f"a list of {kind.__name__}" if is_list else f"a{'n' * (kind is int)} {kind.__name__}"
                raise ValueError(f"{name} must be {wanted}; got {value!r}.")
            items = [kind(item) for item in items]
            if kind is float and not all(map(math.isfinite, items)):
                raise ValueError(f"{name} must be a finite number; got {value!r}.")
            setattr(self, name, items if is_list else items[0])

    @classmethod
    def of(cls, request: PruningConfig | str | None = None, *, replays: bool = False, **fields) -> PruningConfig:
        """Return the config that a request stands for.

        Args:
            request (`PruningConfig` or `str`, *optional*): a config, which is copied and checked again, or the name of
                a preset. The default is the preset `"balanced"`, whose recipe is the defaults of the fields.
            replays (`bool`, defaults to `False`): the config is for a plan that exists already. Nothing is
                reconstructed then unless the request or a field asks for it.
            fields: options that override those of the request.

        Raises:
            TypeError: where `request` is something else, or a field is not an option.
            ValueError: where a value is out of range, or a plan decides what a field asks for, naming it.
        """
        if replays:
            decided = sorted(fields.keys() - UNDECIDED_BY_PLANS)
            if decided:
                options = ", ".join(f"{name}={fields[name]!r}" for name in decided)
                raise ValueError(
                    f"A plan decides which units stay, so {options} would change nothing. Leave out what is named, or "
                    f"prune without the plan."
                )
            if request is None:
                fields.setdefault("reconstruction", ReconstructionKind.NONE)
        if isinstance(request, PruningConfig):
            if fields.get("method", request.method) != request.method:
                get_method(fields["method"])
                raise ValueError(
                    f"The request is a config of method {request.method!r}, and method={fields['method']!r} is "
                    f"another. Leave out method, or pass the options by name and no config."
                )
            return dataclasses.replace(request, **fields)
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
        preset = get_preset(name).fields
        asked = fields.get("method", preset.get("method", DEFAULT_METHOD))
        method = asked if cls is PruningConfig else cls.method
        if preset.get("method", method) != method:
            raise ValueError(f"Preset {name!r} is for method {preset['method']!r}, not for {method!r}.")
        return cls(**{**preset, **fields, "method": method})

    def to_dict(self) -> dict[str, Any]:
        """Return every field that is not of this machine, and the version that wrote it, as JSON values; of a file to
        calibrate on its name."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in OF_THE_MACHINE}
        if self.calibration is not None:
            values["calibration"] = public_name(self.calibration)
        return {**values, "fwdprune_version": __version__}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningConfig:
        """Build the config of `values["method"]`; keys that this version does not know are dropped with a warning.

        Raises:
            ValueError: where `values` is no dictionary, or a value is out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A config is made from a dictionary of its options; got a {type(values).__name__}.")
        values = dict(values)
        written_by = values.pop("fwdprune_version", "an unknown version")
        if "reconstruction" in values and values["reconstruction"] is None:
            by_default = ReconstructionKind.LEAST_SQUARES
            values["reconstruction"] = RECONSTRUCTION_OF_OLD_FILES.get(str(values.get("method")), by_default)
        config_class = get_method(values.get("method", DEFAULT_METHOD)).config_class if cls is PruningConfig else cls
        known = {declared.name for declared in dataclasses.fields(config_class)}
        unknown = sorted(map(str, values.keys() - known))
        if unknown:
            logger.warning(
                "Ignoring the unknown keys %s of a config written by optimum-fwdprune %s; this is %s.",
                ", ".join(unknown),
                written_by,
                __version__,
            )
        return config_class(**{key: value for key, value in values.items() if key in known})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `fwdprune_config.json` into a folder."""
        write_text_atomically(
            as_path(save_directory, "save_directory") / CONFIG_NAME, json.dumps(self.to_dict(), indent=2) + "\n"
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_kwargs) -> PruningConfig:
        """Read the config of a pruned checkpoint: a folder, or a repository of the Hub.

        Args:
            name_or_path (`str` or `Path`): folder or repository id.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like, for `huggingface_hub.hf_hub_download`.
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
        return cls.from_dict(values)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **commit_kwargs):
        """Write `fwdprune_config.json` to a repository of the Hub, creating it where it is missing.

        Args:
            repo_id (`str`): repository id.
            private (`bool`, *optional*): visibility of a new repository.
            token (`str`, *optional*): access token; by default the one that is logged in.
            commit_kwargs: `revision`, `commit_message`, `create_pr` and the like, for `HfApi.upload_file`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        content = json.dumps(self.to_dict(), indent=2).encode()
        return api.upload_file(path_or_fileobj=content, path_in_repo=CONFIG_NAME, repo_id=repo_id, **commit_kwargs)


def _no_option(config_class: type[PruningConfig], name: str, known: Iterable[str]) -> str:
    """Return what is wrong with an option that a config lacks: another method has it, or it is misspelt."""
    owners = [
        owner
        for owner in registered_methods()
        if name in (declared.name for declared in dataclasses.fields(METHODS[owner].config_class))
    ]
    hint = did_you_mean(name, known)
    if owners:
        hint = f" That is an option of method={' or method='.join(map(repr, owners))}."
    return f"{config_class.__name__} has no option {name!r}.{hint}"


def register_method(
    config_class: type[PruningConfig],
    score: Callable[..., Any],
    *,
    statistics: tuple[str, ...] = (),
    calibrated: bool = False,
    additive: bool | Callable[[PruningConfig], bool] = True,
    learns_split: bool = False,
    differentiates: Callable[[PruningConfig], bool] = lambda _config: False,
) -> None:
    """Make a criterion known under `config_class.method`; the arguments are those of [`Method`]."""
    if config_class is PruningConfig or not issubclass(config_class, PruningConfig):
        raise ValueError("config_class must be a dataclass that extends PruningConfig and sets the field `method`.")
    METHODS[config_class.method] = Method(
        config_class, score, tuple(statistics), calibrated, additive, learns_split, differentiates
    )


# Fields that still mean something where a plan is replayed.
UNDECIDED_BY_PLANS = {
    declared.name
    for declared in dataclasses.fields(PruningConfig)
    if declared.metadata.get("group") in (RECONSTRUCTION, CALIBRATION, RUNNING)
}
