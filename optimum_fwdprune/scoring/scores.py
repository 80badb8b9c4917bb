"""Scores with the statistics and tokens that they are based on, so that other budgets can reuse them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..architectures import Site, SiteKey, keyed_by_site
from ..data.calibration import Calibration
from ..files import (
    as_path,
    check_output_file,
    load_tensors,
    save_tensors_atomically,
)
from ..forward.evidence import Evidence, Grams
from ..forward.statistics import SiteStatistics
from ..request.choices import ReconstructionKind, Scope
from ..request.fields import Heading
from ..runs.loggers import get_logger
from ..runs.shelves import Shelf
from ..words import html_table
from .methods import PruningConfig
from .scored import scored_units


logger = get_logger(__name__)

# The file is in a subfolder, since servers such as vLLM read all .safetensors files beside a config as weights.
SCORES_NAME = "fwdprune/scores.safetensors"


@dataclass
class Scores:
    """Scores of every unit, and the statistics and tokens that they are based on.

    Args:
        config (`PruningConfig`): the request that they were made for; they hold for its method and attention unit.
        values (`dict[tuple[int, str], Tensor[num_units]]`): the scores; units with higher scores are kept.
        statistics (`dict[tuple[int, str], SiteStatistics]`): empty where neither method nor reconstruction needs any.
        calibration (`Calibration`, *optional*): the tokens.
        standard_errors (`dict[tuple[int, str], Tensor[num_units]]`): standard errors of estimated scores; else empty.
        details (`dict`): figures on how the scores were computed, as JSON values.
        history (`dict[str, Tensor]`): values of every step of a method that learns.
        grams (`Grams`): Gram matrices for independent least squares, if they were collected with the statistics; they
            are not saved.
        dense_stream (`Shelf`, *optional*): storage for the dense model's hidden states that several reconstructions
            share; it is not saved.
        calibrated_on (`dict[str, str]`): `source` and `fingerprint` of the tokens, also if the tokens themselves were
            not saved; empty where there were none.
        model_type (`str`, *optional*): family of the model; `None` in files of earlier versions.
    """

    config: PruningConfig
    values: dict[SiteKey, torch.Tensor]
    statistics: dict[SiteKey, SiteStatistics]
    calibration: Calibration | None
    standard_errors: dict[SiteKey, torch.Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    history: dict[str, torch.Tensor] = field(default_factory=dict)
    grams: Grams = field(default_factory=dict, repr=False)
    dense_stream: Shelf | None = field(default=None, repr=False)
    calibrated_on: dict[str, str] = field(default_factory=dict)
    model_type: str | None = None

    def __post_init__(self):
        self.values = keyed_by_site(self.values)
        self.standard_errors = keyed_by_site(self.standard_errors)
        if self.calibration is not None and not self.calibrated_on:
            self.calibrated_on = {
                "source": self.calibration.source,
                "fingerprint": self.calibration.fingerprint,
            }

    @property
    def evidence(self) -> Evidence:
        """The tokens and their statistics, for the reconstruction."""
        return Evidence(self.calibration, self.statistics, self.grams, self.dense_stream)

    def calibrated_with(self, calibration: Calibration) -> Scores:
        """Return the same scores with tokens, for stages that run them; warn if they were made on other tokens."""
        fingerprint = self.calibrated_on.get("fingerprint")
        if fingerprint is not None and fingerprint != calibration.fingerprint:
            logger.warning(
                "The scores were made on other calibration tokens (%s, %s) than those of this request (%s, %s). "
                "Checkpoints hold no tokens: pass the same data as dataset, or scores that Scores.save wrote.",
                self.calibrated_on.get("source"),
                fingerprint,
                calibration.source,
                calibration.fingerprint,
            )
        return replace(self, calibration=calibration)

    def _repr_html_(self) -> str:
        header = ("layer", "kind", "units", "lowest score", "mean", "highest")
        rows = [
            (
                str(layer),
                kind,
                str(len(value)),
                *(f"{number:.3g}" for number in (value.min(), value.mean(), value.max())),
            )
            for (layer, kind), value in sorted(self.values.items())
        ]
        return html_table(header, rows)

    def check_matches(self, sites: Iterable[Site], config: PruningConfig, model_type: str) -> None:
        """Raise `ValueError` where the scores belong to another method, attention unit, family or model."""
        if self.model_type not in (None, model_type):
            raise ValueError(
                f"These scores were made for a {self.model_type!r} model, and this one is {model_type!r}. Leave "
                f"scores out to score this model."
            )
        for name in ("method", "attention_unit"):
            made_for, asked = getattr(self.config, name), getattr(config, name)
            if made_for != asked:
                raise ValueError(
                    f"These scores were made with {name}={made_for!r}, and the request has {name}={asked!r}."
                )
        sites = list(sites)
        units, made_for = scored_units(sites, config), scored_units(sites, self.config)
        has_kinds = units.keys() <= self.values.keys() or units.keys() <= made_for.keys()
        if (self.config.depth_kind, self.config.unit_kinds) != (config.depth_kind, config.unit_kinds) or not has_kinds:
            raise ValueError(
                f"These scores were made with kinds={self.config.resolved_kinds}, and the request has "
                f"kinds={config.resolved_kinds}. Score the units again with the kinds of the request."
            )
        known = made_for.keys() | {site.key for site in sites}
        if not made_for.keys() <= self.values.keys() <= known:
            raise ValueError(
                f"These scores were made for another model: they have {len(self.values)} sites, and this model has "
                f"{len(made_for)}."
            )
        for key, (count, what) in units.items():
            if len(self.values[key]) != count:
                raise ValueError(f"These scores were made for another model: they do not fit the {what}.")

    def reads_anew(self, config: PruningConfig) -> bool:
        """Return whether a request that reuses these scores reads its own calibration tokens."""
        return self.calibration is None and (config.rounds > 1 or self.runs_tokens(config))

    def runs_tokens(self, config: PruningConfig) -> bool:
        """Return whether a request that reuses these scores passes calibration tokens through the model again."""
        if config.resolved_scope == Scope.SEARCH or config.reconstruction == ReconstructionKind.LEAST_SQUARES:
            return True
        return config.reconstruction == ReconstructionKind.BIAS and not self.statistics

    def options_into(self, config: PruningConfig, named: Collection[str] = ()) -> PruningConfig:
        """Return `config` with the options that these scores were made with.

        These are the options of their method, the seed and, unless the request reads its own tokens, the calibration.
        A warning names options that the request sets to other values.

        Args:
            config (`PruningConfig`): the request.
            named (collection of `str`): options that were passed by name; they count as set even if they have the
                default value, unlike other options.
        """
        made_with = {name: getattr(self.config, name) for name in self._options(config)}
        defaults = type(config)()
        other = [
            name
            for name, value in made_with.items()
            if (name in named or getattr(config, name) != getattr(defaults, name))
            and config.to_dict()[name] != self.config.to_dict()[name]
        ]
        if other:
            logger.warning(
                "The scores were made with %s, which this request uses too, instead of %s. Leave out scores to score "
                "again.",
                ", ".join(f"{name}={made_with[name]!r}" for name in other),
                ", ".join(f"{name}={getattr(config, name)!r}" for name in other),
            )
        return replace(config, **made_with)

    def _options(self, config: PruningConfig) -> list[str]:
        """Return the options of a request that these scores determine."""
        shared = {declared.name: declared for declared in fields(PruningConfig)}
        decided = [declared.name for declared in fields(self.config) if declared.name not in shared]
        if self.reads_anew(config):
            return [*decided, "seed"]
        # The batch size does not change scores.
        calibration = [
            name for name, declared in shared.items() if declared.metadata.get("group") == Heading.CALIBRATION
        ]
        return [*decided, *(name for name in calibration if name != "batch_size")]

    def check_dataset(self, calibration: Calibration) -> None:
        """Warn where data that was passed with these scores differs from their own, which is used instead."""
        if self.calibrated_on.get("fingerprint") not in (None, calibration.fingerprint):
            logger.warning(
                "The scores include the calibration tokens that they were made on (%s), so that dataset (%s), which "
                "differs, is not used. Leave out scores to score again.",
                self.calibrated_on.get("source"),
                calibration.source,
            )

    def save(self, path: str | Path, tokens: bool = True) -> None:
        """Write everything to one safetensors file.

        Args:
            path (`str` or `Path`): the file.
            tokens (`bool`, defaults to `True`): include the calibration tokens. They can be decoded with the
                tokenizer, so that checkpoints include their fingerprint only. So do scores of rows with images.
        """
        tensors = {}
        for key, value in self.values.items():
            tensors[f"scores.{key}"] = value
        for key, statistics in self.statistics.items():
            tensors[f"mean.{key}"] = statistics.mean
            tensors[f"variance.{key}"] = statistics.variance
            tensors |= {} if statistics.routed is None else {f"routed.{key}": statistics.routed}
        for key, error in self.standard_errors.items():
            tensors[f"standard_error.{key}"] = error
        tensors |= {f"history.{name}": values for name, values in self.history.items()}
        metadata: dict[str, Any] = {"config": self.config.to_dict(), "details": self.details}
        if self.model_type is not None:
            metadata["model_type"] = self.model_type
        if self.statistics:
            metadata["count"] = next(iter(self.statistics.values())).count
        if self.calibrated_on:
            metadata["calibrated_on"] = self.calibrated_on
        if self.calibration is not None and tokens and not self.calibration.inputs:
            tensors["input_ids"] = self.calibration.input_ids
            if self.calibration.attention_mask is not None:
                tensors["attention_mask"] = self.calibration.attention_mask
        path = check_output_file(as_path(path, "path"))
        save_tensors_atomically(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores from a file, or from the checkpoint folder that holds them.

        Raises:
            ValueError: where the file holds no scores.
        """
        path = as_path(path, "path")
        path = path / SCORES_NAME if path.is_dir() else path
        groups: dict[str, dict[SiteKey, torch.Tensor]] = {
            name: {} for name in ("scores", "mean", "variance", "routed", "standard_error")
        }
        tokens, history = {}, {}
        try:
            tensors, metadata = load_tensors(path)
            for name, tensor in tensors.items():
                group, _, site = name.partition(".")
                if group in groups:
                    groups[group][SiteKey.parse(site)] = tensor
                elif group == "history":
                    history[site] = tensor
                else:
                    tokens[name] = tensor
            config = PruningConfig.from_dict(metadata["config"])
            statistics = {
                key: SiteStatistics(metadata["count"], mean, groups["variance"][key], routed=groups["routed"].get(key))
                for key, mean in groups["mean"].items()
            }
            # Earlier versions stored the source only.
            calibrated_on = metadata.get("calibrated_on", {})
            calibration = (
                Calibration(
                    tokens["input_ids"],
                    tokens.get("attention_mask"),
                    calibrated_on.get("source") or metadata["source"],
                )
                if "input_ids" in tokens
                else None
            )
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} holds no scores: {type(error).__name__}: {error}.") from error
        errors, details = groups["standard_error"], metadata.get("details", {})
        return cls(
            config,
            groups["scores"],
            statistics,
            calibration,
            errors,
            details,
            history,
            calibrated_on=calibrated_on,
            model_type=metadata.get("model_type"),
        )
